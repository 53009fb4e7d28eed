"""A finished student with fewer channels in its convolutional picture tower, before it has recovered."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from clipdistill.towers.inheritance.convolutional import Importance, prune_channels
from clipdistill.towers.student import DualEncoder


def pruned(
    student: DualEncoder, share: float, pixels: Tensor, *, importance: Importance = "magnitude", seed: int = 0
) -> DualEncoder:
    """A student of its own, on the CPU, whose picture tower keeps a share of its channels; the texts stay as they are.

    What it embeds of pictures is far from what it did: it has to be trained again for a while.

    Args:
        student: The student; it is not changed.
        share: The share of channels that stays, above 0 and below 1.
        pixels: Calibration pictures as the student takes them: float32 [pictures, 3, height, width].
        importance: By what the channels are chosen.
        seed: Decides ``taylor``'s random signs.

    Raises:
        ConfigError: If the tower is of a kind that cannot be pruned.
        DataError: If there are fewer than 2 pictures.
        MissingExtraError: If torch-pruning is not installed.
    """
    model: Any = deepcopy(student.model).cpu().to(memory_format=torch.contiguous_format)
    prune_channels(model.visual, share, pixels, importance=importance, seed=seed, section="compress.prune")
    smaller = DualEncoder(
        model,
        student.model_cfg,
        student.tokenizer,
        student.preprocess,
        projection=None if student.projection is None else deepcopy(student.projection).cpu(),
        dims=student.dims,
        max_pixels=student.max_pixels,
        pruned=True,
    )
    smaller.module.eval()
    return smaller
