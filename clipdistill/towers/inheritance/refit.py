"""A cut tower's weights fitted to its source's activations, in closed form.

Cutting leaves out what the dropped parts would have added. From the first block to the last, each layer of the cut
tower is fitted so that, given what the cut tower itself has there, it puts out what its source does on the kept
channels. A linear layer's weights solve

    argmin_W ||X W - Y||^2 + l ||W - W_0||^2  =  W_0 + (X^T X + l I)^-1 X^T (Y - X W_0)

with the cut weights W_0 in the place of zero (ridge regression; Hoerl and Kennard, 1970; layer-wise reconstruction as
in ThiNet, Luo et al., 2017), a layer norm's gain and shift by one such regression a channel. The output of a block's
MLP is fitted to the stream before the next kept block, so that it takes on what the blocks between did. Where nothing
was lost the residual is zero, and the weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.towers.inheritance.cut import Kept
from clipdistill.towers.inheritance.tower import Tower, attended, block_step, projected, still

_TOKENS = 1 << 15
"""At most so many tokens are fitted to: the streams of both towers lie in memory whole."""
_RIDGE = 1e-2
"""l as a share of the mean diagonal of X^T X."""
_BATCH = 64


@torch.no_grad()
def refit(source: Tower, cut: Tower, kept: Kept, inputs: Tensor, rotation: Tensor | None = None) -> None:
    """Fit a cut tower to its source.

    Args:
        source: The tower that it was cut out of.
        cut: The cut tower, changed in place. Its embedding tables are not looked at.
        kept: What was kept.
        inputs: Calibration rows as the source takes them.
        rotation: [source's dim, dim]: what maps the source's embeddings to the cut tower's space; None = the identity.
    """
    whole = still(source)
    inputs = inputs[: max(1, _TOKENS // whole.counted(inputs[:1]).shape[1])]
    counted = whole.counted(inputs).cpu()
    wanted = _batched(whole.embedded, inputs)
    found = wanted[..., kept.channels]
    if whole.first_norm is not None and cut.first_norm is not None:
        wanted = _batched(whole.first_norm, wanted)
        found = _fit_norm(cut.first_norm, found, wanted[..., kept.channels], counted)
    for place, number in enumerate(kept.blocks):
        behind = kept.blocks[place + 1] if place + 1 < len(kept.blocks) else whole.shape.layers
        for skipped in range(number) if place == 0 else ():
            wanted = _through(whole, skipped, wanted)
        step = _Step(whole, cut, kept, place, counted)
        wanted, found = step.fitted(wanted, found, behind)
    _fit_last(whole, cut, kept, inputs, wanted, found, rotation)


@dataclass(frozen=True)
class _Step:
    """One kept block of both towers.

    Attributes:
        whole: The source.
        cut: The cut tower.
        kept: What was kept.
        place: Which of the kept blocks.
        counted: Which tokens are fitted to.
    """

    whole: Tower
    cut: Tower
    kept: Kept
    place: int
    counted: Tensor

    def fitted(self, wanted: Tensor, found: Tensor, behind: int) -> tuple[Tensor, Tensor]:
        """Fit the block; both streams before it become both streams before the block ``behind``."""
        number, channels = self.kept.blocks[self.place], self.kept.channels
        old, new = self.whole.blocks[number], self.cut.blocks[self.place]
        read = _batched(old.ln_1, wanted)
        queries = _batched(lambda rows: projected(old, rows)[..., self._wide(old)], read)
        found_read = _fit_norm(new.ln_1, found, read[..., channels], self.counted)
        found_read = self._linear(_InProjection(new.attn), found_read, queries)
        heads = _batched(lambda rows: attended(new, rows, self.cut.causal).flatten(2), found_read)
        wanted_mid = wanted + _batched(
            lambda rows: old.ls_1(old.attn.out_proj(attended(old, projected(old, rows), self.whole.causal).flatten(2))),
            read,
        )
        found = found + self._added(new.attn.out_proj, new.ls_1, heads, wanted_mid[..., channels] - found)
        read = _batched(old.ln_2, wanted_mid)
        found_read = _fit_norm(new.ln_2, found, read[..., channels], self.counted)
        units = _batched(lambda rows: old.mlp.c_fc(rows)[..., self.kept.hidden[self.place]], read)
        hidden: Tensor = new.mlp.gelu(self._linear(new.mlp.c_fc, found_read, units))
        for passed in range(number, behind):
            wanted = _through(self.whole, passed, wanted)
        return wanted, found + self._added(new.mlp.c_proj, new.ls_2, hidden, wanted[..., channels] - found)

    def _wide(self, old: Any) -> Tensor:
        """The numbers of the kept heads' queries, keys and values."""
        width = old.attn.embed_dim
        inner = torch.arange(width).view(old.attn.num_heads, -1)[self.kept.heads[self.place]].flatten()
        return torch.cat([inner + part * width for part in range(3)])

    def _linear(self, layer: Any, given: Tensor, wanted: Tensor) -> Tensor:
        fit_linear(layer, given[self.counted], wanted[self.counted])
        fitted: Tensor = given @ layer.weight.T + layer.bias
        return fitted

    def _added(self, layer: nn.Linear, scale: nn.Module, given: Tensor, wanted: Tensor) -> Tensor:
        """Fit what a layer adds to the stream behind its layer scale; a channel scaled by zero stays as it is."""
        gain: Tensor = scale(torch.ones(layer.out_features))
        unscaled = torch.where(gain == 0, given @ layer.weight.T + layer.bias, wanted / gain)
        return self._linear(layer, given, unscaled) * gain


@dataclass
class _InProjection:
    """The queries', keys' and values' projection of an attention as a linear layer."""

    attn: Any

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.attn.in_proj_weight
        return weight

    @property
    def bias(self) -> Tensor:
        bias: Tensor = self.attn.in_proj_bias
        return bias


def fit_linear(layer: Any, given: Tensor, wanted: Tensor) -> None:
    """Fit a linear layer's weight and bias, in place.

    Args:
        layer: With ``weight`` [out, in] and ``bias`` [out] or None.
        given: Its inputs [rows, in].
        wanted: What it should give [rows, out].
    """
    x, residual = given.double(), wanted.double() - given.double() @ layer.weight.double().T
    if layer.bias is not None:
        residual = residual - layer.bias.double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    gram = x.T @ x
    ridge = _RIDGE * gram.diagonal().mean()
    gram.diagonal().add_(ridge.clamp_min(torch.finfo(torch.float64).tiny))
    change = torch.linalg.solve(gram, x.T @ residual).T.to(layer.weight.dtype)
    layer.weight.add_(change[:, : layer.weight.shape[1]])
    if layer.bias is not None:
        layer.bias.add_(change[:, -1])


def _fit_norm(norm: nn.LayerNorm, given: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """Fit a layer norm's gain and shift, a channel at a time, and give what it then puts out.

    Args:
        norm: Changed in place.
        given: Its inputs [..., width].
        wanted: What it should give [..., width].
        counted: Which tokens are fitted to.
    """
    plain = nn.functional.layer_norm(given, norm.normalized_shape, eps=norm.eps)
    x = plain[counted].double()
    residual = wanted[counted].double() - x * norm.weight.double()
    if norm.bias is not None:
        residual = residual - norm.bias.double()
    centre = x.mean(dim=0)
    deviation = x - centre
    power = deviation.square().mean(dim=0)
    gain = (deviation * residual).mean(dim=0) / (power + _RIDGE * power.mean() + 1e-12)
    norm.weight.add_(gain.to(norm.weight.dtype))
    if norm.bias is not None:
        norm.bias.add_((residual.mean(dim=0) - gain * centre).to(norm.bias.dtype))
    fitted: Tensor = norm(given)
    return fitted


def _fit_last(
    whole: Tower, cut: Tower, kept: Kept, inputs: Tensor, wanted: Tensor, found: Tensor, rotation: Tensor | None
) -> None:
    """Fit the last layer norm, and then the projection to the source's embeddings."""
    before, ours = whole.before_last_norm(wanted, inputs), cut.before_last_norm(found, inputs)
    counted = whole.counted(inputs).cpu() if ours.ndim == 3 else torch.ones(len(ours), dtype=torch.bool)
    read = whole.last_norm(before)
    ours = _fit_norm(cut.last_norm, ours, read[..., kept.channels], counted)
    rows = whole.finish(wanted, inputs)
    fit_linear(
        _Projection(cut), cut.after_last_norm(ours, inputs), rows if rotation is None else rows @ rotation.to(rows)
    )


@dataclass
class _Projection:
    """A tower's last projection as a linear layer: its parameter may lie the other way round."""

    tower: Tower

    @property
    def weight(self) -> Tensor:
        return self.tower.projection.T

    @property
    def bias(self) -> Tensor | None:
        return self.tower.projection_bias


def _through(whole: Tower, number: int, stream: Tensor) -> Tensor:
    return _batched(lambda rows: block_step(whole.blocks[number], rows, whole.causal), stream)


def _batched(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return torch.cat([function(part) for part in torch.split(rows, _BATCH)])
