"""The augmented feature loss: the student's embedding should complete the teacher's."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipdistill.losses.batch import Embeddings
from clipdistill.losses.contrastive import clip_loss

_SEED = 0


@final
class AugmentedFeature(nn.Module):
    """CLIP's loss on what two learned maps make of the student's and the teacher's embeddings side by side.

    ``1/2 [CE(s a b^T) + CE(s b a^T)]``, ``a = A [u; p]`` and ``b = B [v; q]`` made unit: CLIP-KD's AFD (Yang et al.
    2024, arXiv 2307.12732). The maps serve the training alone: they are kept in checkpoints, not with the student.

    Args:
        dim: The width of the student's own embeddings, and of what the maps make.
        teacher_dim: The width of the teacher's.
    """

    def __init__(self, dim: int, teacher_dim: int) -> None:
        super().__init__()
        # On the CPU and from a seed of its own, so that neither the device nor the ambient random state decides it.
        generator = torch.Generator().manual_seed(_SEED)
        self.dim = dim
        self.image, self.text = (_linear(dim + teacher_dim, dim, generator) for _ in range(2))

    def forward(self, student: Embeddings, teacher: Embeddings, scale: Tensor | float, positives: Tensor) -> Tensor:
        """Measure one batch's pairs.

        Args:
            student: The student's own unit rows, [pairs, at most dim] each; narrower ones are the first of all columns.
            teacher: The teacher's unit rows, [pairs, teacher_dim] each.
            scale: s, the inverse temperature.
            positives: bool [pairs, pairs]; [i, j] where text j describes image i, the diagonal always.

        Returns:
            A scalar. No gradient reaches the teacher's side.
        """
        images = self._fused(self.image, student.images, teacher.images)
        texts = self._fused(self.text, student.texts, teacher.texts)
        return clip_loss(images, texts, scale, positives)

    def _fused(self, fuse: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        whole = F.pad(student, (0, self.dim - student.shape[1]))
        return F.normalize(fuse(torch.cat([whole, teacher.detach()], dim=1)), dim=1)


def _linear(wide: int, narrow: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(wide, narrow, device="meta").to_empty(device="cpu")  # no random number is drawn
    bound = wide**-0.5  # torch's own for a linear map
    with torch.no_grad():
        for value in (linear.weight, linear.bias):
            value.uniform_(-bound, bound, generator=generator)
    return linear
