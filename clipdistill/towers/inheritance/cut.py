"""Which parts of a transformer tower are kept, and the weights that are left of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipdistill.config import InheritConfig
from clipdistill.towers.inheritance.importance import Scores
from clipdistill.towers.inheritance.shape import Shape
from clipdistill.towers.inheritance.tower import Tower

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Kept:
    """The parts of a tower that are kept, each list rising.

    Attributes:
        blocks: Numbers of blocks.
        channels: Channels of the residual stream.
        heads: For each kept block its heads.
        hidden: For each kept block its hidden units.
    """

    blocks: tuple[int, ...]
    channels: Tensor
    heads: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]


def choose(old: Shape, new: Shape, rule: InheritConfig, scores: Scores | None) -> Kept:
    """Choose what is kept.

    Args:
        old: The measures of the tower that is cut.
        new: The measures that are left.
        rule: How to choose: ``depth_by`` and ``width_by``.
        scores: How much each part matters; None where nothing is chosen by that.
    """
    by_depth = scores if rule.depth_by == "importance" else None
    by_width = scores if rule.width_by == "importance" else None
    evenly = stride(old.layers, new.layers)
    blocks: list[int] = evenly if by_depth is None else _top(by_depth.blocks, new.layers).tolist()
    if by_width is None:
        heads, hidden = torch.arange(new.heads), torch.arange(new.hidden)
        same = (heads,) * len(blocks), (hidden,) * len(blocks)
        return Kept(tuple(blocks), torch.arange(new.width), *same)
    return Kept(
        tuple(blocks),
        _top(by_width.channels, new.width),
        tuple(_top(by_width.heads[number], new.heads) for number in blocks),
        tuple(_top(by_width.hidden[number], new.hidden) for number in blocks),
    )


def stride(layers: int, kept: int) -> list[int]:
    """Numbers of blocks at even distances, the first and the last among them; of all but one, the first."""
    if kept == 1:
        return [0]
    return [round(number * (layers - 1) / (kept - 1)) for number in range(kept)]


def cut(tower: Tower, kept: Kept) -> Weights:
    """The weights of the kept parts, under the names of open_clip's own towers, in float32 on the CPU.

    Every part of the residual stream (embeddings, layer norms, readers and writers, the last projection) keeps the
    same channels. What is kept of everything is the tower itself, bit for bit.
    """
    weights: Weights = {}
    for place, number in enumerate(kept.blocks):
        block = _block(tower.blocks[number], kept.channels, kept.heads[place], kept.hidden[place])
        weights |= {f"transformer.resblocks.{place}.{name}": value for name, value in block.items()}
    weights |= _image_ends(tower.module, kept.channels) if tower.side == "image" else _text_ends(tower, kept.channels)
    return {name: value.detach().float().cpu().clone() for name, value in weights.items()}


def resized_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A picture tower's position table for another grid, by bicubic interpolation, as open_clip resizes them.

    Args:
        table: [1 + rows * columns, width], the class token's first.
        old: Rows and columns of its grid.
        new: Those of the wanted one.
    """
    if old == new:
        return table
    first, grid = table[:1], table[1:].T.reshape(1, -1, *old)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, grid.flatten(2)[0].T])


def _top(scores: Tensor, count: int) -> Tensor:
    """The numbers of the largest scores, rising; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _block(block: Any, channels: Tensor, heads: Tensor, hidden: Tensor) -> Weights:
    attn, mlp = block.attn, block.mlp
    inner = _inner(heads, attn.num_heads, attn.embed_dim)
    wide = torch.cat([inner + part * attn.embed_dim for part in range(3)])  # queries, keys, values
    return {
        "attn.in_proj_weight": attn.in_proj_weight[wide][:, channels],
        "attn.in_proj_bias": attn.in_proj_bias[wide],
        "attn.out_proj.weight": attn.out_proj.weight[channels][:, inner],
        "attn.out_proj.bias": attn.out_proj.bias[channels],
        "mlp.c_fc.weight": mlp.c_fc.weight[hidden][:, channels],
        "mlp.c_fc.bias": mlp.c_fc.bias[hidden],
        "mlp.c_proj.weight": mlp.c_proj.weight[channels][:, hidden],
        "mlp.c_proj.bias": mlp.c_proj.bias[channels],
        **_norm("ln_1", block.ln_1, channels),
        **_norm("ln_2", block.ln_2, channels),
        **{
            f"{name}.gamma": getattr(block, name).gamma[channels]
            for name in ("ls_1", "ls_2")
            if not isinstance(getattr(block, name), nn.Identity)
        },
    }


def _inner(heads: Tensor, count: int, width: int) -> Tensor:
    """The numbers of the kept heads' own channels, head by head."""
    return torch.arange(width).view(count, -1)[heads].flatten()


def _norm(name: str, norm: nn.Module, channels: Tensor) -> Weights:
    return {f"{name}.{key}": value[channels] for key, value in norm.state_dict().items()}


def _image_ends(visual: Any, channels: Tensor) -> Weights:
    return {
        "conv1.weight": visual.conv1.weight[channels],
        "class_embedding": visual.class_embedding[channels],
        "positional_embedding": visual.positional_embedding[:, channels],
        **_norm("ln_pre", visual.ln_pre, channels),
        **_norm("ln_post", visual.ln_post, channels),
        "proj": visual.proj[channels],
    }


def _text_ends(tower: Tower, channels: Tensor) -> Weights:
    text = tower.module
    last, bias = tower.projection[channels], tower.projection_bias
    projection = {"text_projection": last}
    if bias is not None:
        projection = {"text_projection.weight": last.T, "text_projection.bias": bias}
    return {
        "token_embedding.weight": text.token_embedding.weight[:, channels],
        "positional_embedding": text.positional_embedding[:, channels],
        **_norm("ln_final", text.ln_final, channels),
        **projection,
    }


def rows_of(table: Tensor, ids: Sequence[int | None], generator: torch.Generator) -> Tensor:
    """A token table's rows of the kept tokens; tokens without one are drawn at the table's own scale.

    Args:
        table: [source's tokens, width].
        ids: For each token of the new table the row, or None.
        generator: Draws the rest, on the CPU.
    """
    drawn = torch.randn(len(ids), table.shape[1], generator=generator) * table.std()
    known = [number for number, row in enumerate(ids) if row is not None]
    drawn[known] = table[[row for row in ids if row is not None]]
    return drawn
