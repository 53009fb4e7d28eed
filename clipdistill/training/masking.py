"""Pictures with most patches masked, for the masked feature loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipdistill.training.sampler import permutation

GRID = 7
"""Patches along a side, whatever the tower: those of a ViT/32 at 224 pixels."""


def mask_patches(pixels: Tensor, keys: Sequence[str], ratio: float, seed: int, step: int) -> Tensor:
    """Fill random patches of normalised pictures with their mean colour, which is 0.

    Which patches is a function of the seed, the step and the picture's key alone: neither the other pictures of the
    batch nor how it is cut into parts changes them.

    Args:
        pixels: float [pictures, 3, height, width], as the student's preprocessing normalises them.
        keys: Of the pictures.
        ratio: The share of the patches that is masked; at least one patch is, and at least one is not.
        seed: The run's seed.
        step: The step, counted from 0.
    """
    height, width = pixels.shape[-2:]
    kept = [_kept(height, width, ratio, seed, "mask", step, key) for key in keys]
    whole = np.stack(kept) if kept else np.zeros((0, height, width), np.bool_)
    return pixels * torch.from_numpy(whole).to(pixels.device)[:, None]


@contextmanager
def statistics_at_rest(module: nn.Module) -> Iterator[None]:
    """A block in which batch norms do not learn statistics: those of masked pictures are not those it will meet.

    Their momentum is 0 for the block. Putting the statistics back afterwards would change tensors that the backward
    pass still needs.
    """
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


def _kept(height: int, width: int, ratio: float, *names: object) -> npt.NDArray[np.bool_]:
    """Bool [height, width]: the pixels of the patches that are not masked."""
    rows, columns = min(GRID, height), min(GRID, width)
    patches = rows * columns
    masked = min(max(1, round(ratio * patches)), patches - 1)
    kept = np.ones(patches, np.bool_)
    kept[permutation(patches, *names)[:masked]] = False
    row_of, column_of = np.arange(height) * rows // height, np.arange(width) * columns // width
    return kept.reshape(rows, columns)[row_of][:, column_of]
