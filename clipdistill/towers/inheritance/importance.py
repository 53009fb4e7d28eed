"""How much each part of a transformer tower matters, measured on calibration rows.

``activation`` weighs what a part puts out by the weights that read it: a channel by E[h^2] ||W||^2, as Wanda does
(Sun et al., 2024), a head and a hidden unit by the energy of what it adds to the residual stream, a block by how far
it turns the stream, 1 - cos(before, behind) (ShortGPT; Men et al., 2024).

``taylor`` weighs a part by how far the embedding would move without it, to the first order: with a gate g = 1 on the
part, E ||de/dg||^2 for the unit embedding e (Molchanov et al., 2019, with the embedding in the place of a loss, which
is at its least where the model is its own teacher). The squared norm is estimated by random signs r, since
E_r (d(r.e)/dg)^2 = ||de/dg||^2 (Hutchinson, 1989).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from clipdistill.towers.inheritance.tower import Tower, still

Kind = Literal["activation", "taylor"]
_BATCH, _PROBES = 32, 4


@dataclass(frozen=True)
class Scores:
    """How much each part matters; higher is more. All on the CPU.

    Attributes:
        blocks: [layers].
        channels: [width], of the residual stream.
        heads: [layers, heads].
        hidden: [layers, hidden].
    """

    blocks: Tensor
    channels: Tensor
    heads: Tensor
    hidden: Tensor


def measure(tower: Tower, inputs: Tensor, kind: Kind, seed: int = 0) -> Scores:
    """Measure how much each part of a tower matters.

    Args:
        tower: The tower; it is not changed.
        inputs: The calibration rows, as the tower itself takes them: pixels or token ids.
        kind: Which measure.
        seed: Decides ``taylor``'s random signs.
    """
    copied = still(tower)
    found: dict[tuple[str, int], Tensor] = {}
    method = _activation if kind == "activation" else _taylor
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.split(inputs, _BATCH):
        for key, value in method(copied, rows, generator).items():
            found[key] = found.get(key, torch.zeros_like(value)) + value
    return _scores(tower, found)


def _scores(tower: Tower, found: dict[tuple[str, int], Tensor]) -> Scores:
    def of(kind: str) -> Tensor:
        return torch.stack([found[kind, number].double().cpu() for number in range(tower.shape.layers)])

    readers = [value.double().cpu() for (kind, _), value in found.items() if kind == "width"]
    # each reader counts the same: the late ones, whose values are larger, would otherwise decide alone
    channels = torch.stack([value / value.sum().clamp_min(1e-300) for value in readers]).sum(dim=0)
    return Scores(of("block").flatten(), channels, of("heads"), of("hidden"))


@torch.no_grad()
def _activation(tower: Tower, inputs: Tensor, generator: torch.Generator) -> dict[tuple[str, int], Tensor]:
    """Energies of one batch, summed over its tokens."""
    sums: dict[tuple[str, int], Tensor] = {}
    counted = tower.counted(inputs)
    before: list[Tensor] = []

    def tap(kind: str, number: int, values: Tensor) -> Tensor:
        tokens = values[counted] if values.shape[:2] == counted.shape else values
        if kind == "stream":
            if before:
                sums["block", number - 1] = (1 - F.cosine_similarity(before.pop(), tokens, dim=-1)).sum(dim=0)
            before.append(tokens)
        elif kind == "width":
            sums[kind, number] = tokens.square().sum(dim=0) * _read_by(tower, number)
        elif kind == "hidden":
            sums[kind, number] = tokens.square().sum(dim=0) * tower.blocks[number].mlp.c_proj.weight.square().sum(dim=0)
        elif kind == "heads":
            sums[kind, number] = _head_energy(tokens, tower.blocks[number].attn.out_proj.weight)
        return values

    tower.finish(tower.run(tower.embedded(inputs), tap), inputs, tap)
    return sums


def _read_by(tower: Tower, number: int) -> Tensor:
    """The squared norm of the weights that read each channel behind a layer norm: [width]."""
    layer, second = divmod(number, 2)
    if layer == tower.shape.layers:
        return tower.projection.square().sum(dim=1)
    block = tower.blocks[layer]
    weight: Tensor = block.mlp.c_fc.weight if second else block.attn.in_proj_weight
    return weight.square().sum(dim=0)


def _head_energy(tokens: Tensor, out: Tensor) -> Tensor:
    """The energy of what each head adds: [tokens, heads, head width] and [width, heads * head width] to [heads]."""
    _, heads, width = tokens.shape
    by_head = out.view(len(out), heads, width).permute(1, 0, 2)
    return torch.einsum("hdw,thw->htd", by_head, tokens).square().sum(dim=(1, 2))


def _taylor(tower: Tower, inputs: Tensor, generator: torch.Generator) -> dict[tuple[str, int], Tensor]:
    """Squared derivatives of one batch's embeddings by each row's own gates, summed over the rows."""
    gates, tap = _gates(tower, inputs)
    with torch.enable_grad():
        rows = F.normalize(tower.finish(tower.run(tower.embedded(inputs), tap), inputs, tap), dim=-1)
    names = list(gates)
    sums: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(()))
    for probe in range(_PROBES):
        signs = torch.randint(0, 2, rows.shape, generator=generator).to(rows) * 2 - 1
        wanted = torch.autograd.grad(
            (rows * signs).sum(), [gates[name] for name in names], retain_graph=probe + 1 < _PROBES
        )
        for name, derivative in zip(names, wanted, strict=True):
            sums[name] = sums[name] + derivative.flatten(1).square().sum(dim=0) / _PROBES
    return dict(sums)


def _gates(tower: Tower, inputs: Tensor) -> tuple[dict[tuple[str, int], Tensor], Callable[[str, int, Tensor], Tensor]]:
    """Gates of 1 a row and part, and the tap that puts them in."""
    shape, rows = tower.shape, len(inputs)
    gates: dict[tuple[str, int], Tensor] = {}
    for name, size in _gated(shape.layers, shape.width, shape.heads, shape.hidden):
        gates[name] = torch.ones(rows, *size, device=inputs.device, requires_grad=True)

    def tap(kind: str, number: int, values: Tensor) -> Tensor:
        if kind == "stream":
            return values
        gate = gates[kind, 0 if kind == "width" else number]
        return values * (gate[:, 0] if values.ndim == 2 else gate)

    return gates, tap


def _gated(layers: int, width: int, heads: int, hidden: int) -> Iterator[tuple[tuple[str, int], tuple[int, ...]]]:
    yield ("width", 0), (1, width)  # one for all layer norms: a channel leaves all of them at once
    for number in range(layers):
        yield ("heads", number), (1, heads, 1)
        yield ("hidden", number), (1, hidden)
        yield ("block", number), (1, 1)
