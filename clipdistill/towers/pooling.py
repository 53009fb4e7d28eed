"""What a block gives, as cells: the places of a picture or the spans of a text, resampled so that towers compare.

A convolution's block gives a map, a transformer's a sequence of tokens, and two towers seldom have as many places. So
both are averaged over equal cells: the same part of the picture, or of the text, in both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipdistill.core.errors import ConfigError

Grid = tuple[int, int]


def pool_map(places: Tensor, cells: int) -> Tensor:
    """Average a map over ``cells`` x ``cells`` parts of the picture, as torch's adaptive average pooling cuts them.

    By matrix products: torch's own kernel has no deterministic gradient on CUDA devices.

    Args:
        places: float [rows, width, height, width of the map].
        cells: How many parts along each axis; 1 = the mean over all places.

    Returns:
        float32 [rows, cells x cells, width], row by row of the picture.
    """
    down, across = (_averages(size, cells).to(places.device) for size in places.shape[2:])
    pooled = torch.einsum("ih,bchw,jw->bijc", down, places.float(), across)
    return pooled.flatten(1, 2)


def pool_picture_tokens(tokens: Tensor, cells: int, prefix: int, grid: Grid | None, name: str) -> Tensor:
    """Average a ViT's tokens over ``cells`` x ``cells`` parts of the picture; class and register tokens are left out.

    Args:
        tokens: float [rows, tokens, width].
        cells: As for :func:`pool_map`.
        prefix: How many tokens before the picture's stand for no place. A block before they are added has none.
        grid: The picture's tokens down and across, where the tower tells; otherwise a square.
        name: The block, for messages.

    Returns:
        float32 [rows, cells x cells, width].

    Raises:
        ConfigError: If the tokens are no grid and more than their mean is asked for.
    """
    count = tokens.shape[1]
    shape = _grid(count, prefix, grid)
    if shape is None and cells > 1:
        raise ConfigError(
            f'features.pool: {name} gives {count} tokens, which are no grid of places; use pool = "mean", or another '
            "block"
        )
    height, width = shape or (1, count - (prefix if count > prefix else 0))
    places = tokens[:, count - height * width :].transpose(1, 2)
    return pool_map(places.reshape(*places.shape[:2], height, width), cells)


def pool_text_tokens(tokens: Tensor, first: int, lengths: Tensor, cells: int) -> Tensor:
    """Average a text's own tokens over ``cells`` spans of equal length; padding is left out.

    Args:
        tokens: float [rows, length, width].
        first: How many tokens at the beginning are left out, where a text has more than these.
        lengths: int64 [rows]: how many tokens of each row are no padding.
        cells: How many spans; they overlap where a text has fewer tokens. 1 = the mean.

    Returns:
        float32 [rows, cells, width].
    """
    length, device = tokens.shape[1], tokens.device
    lengths = lengths.to(device).clamp(1, length)
    start = torch.full_like(lengths, first).minimum(lengths - 1)
    span = torch.arange(cells, device=device)
    own = (lengths - start)[:, None]
    begin = start[:, None] + span * own // cells
    end = start[:, None] + ((span + 1) * own + cells - 1) // cells
    place = torch.arange(length, device=device)
    inside = (place >= begin[..., None]) & (place < end[..., None])
    shares = inside.float() / (end - begin)[..., None]
    # Not by a product with zeros alone: what a tower makes of padding may be no number.
    used = inside.any(dim=1)[..., None]
    return shares @ torch.where(used, tokens.float(), 0.0)


def at_unit_scale(cells: Tensor) -> Tensor:
    """Cells divided by their root mean square over the width, so that float16 holds them; cosines do not change."""
    return cells / cells.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def _grid(count: int, prefix: int, grid: Grid | None) -> Grid | None:
    if grid is not None and count - grid[0] * grid[1] in (prefix, 0):
        return grid
    for places in (count - prefix, count):
        side = math.isqrt(max(0, places))
        if side and side * side == places:
            return side, side
    return None


def _averages(size: int, cells: int) -> Tensor:
    """float32 [cells, size]: the share of each place in each part."""
    shares = torch.zeros(cells, size)
    for cell in range(cells):
        begin, end = cell * size // cells, -(-(cell + 1) * size // cells)
        shares[cell, begin:end] = 1 / (end - begin)
    return shares
