"""A teacher that runs while the student trains, on what its own transform and tokenizer make of the student's batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from clipdistill.towers import context
from clipdistill.towers.teacher import Teacher


@final
@dataclass(frozen=True, slots=True)
class TeacherPreparation:
    """How one teacher's input is made; without its network, so that a process that decodes pictures need not hold it.

    Attributes:
        transform: From a decoded RGB picture to float32 [3, height, width].
        tokenizer: From texts to int64 [texts, context].
    """

    transform: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]

    def prepare(self, image: Image.Image) -> Tensor:
        """A decoded picture, or a view cut out of one, as the teacher takes it: float32 [3, height, width]."""
        return self.transform(image)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Texts as the teacher takes them: int64 [texts, context]; each row depends on its text alone."""
        return self.tokenizer(list(texts)) if texts else torch.zeros(0, 0, dtype=torch.int64)


@final
class LiveTeacher:
    """A teacher as the training loop runs it: the embeddings are those of :class:`Teacher`, with gradients if wanted.

    Nothing is asked of the teacher but what :class:`Teacher` asks: its resolution and tokenizer may differ from the
    student's, and its text tower may attend to the padding, as SigLIP's does.

    Args:
        teacher: The teacher. Its network is used, not copied.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.preparation = TeacherPreparation(teacher.transform, teacher.tokenizer)

    @property
    def dim(self) -> int:
        """The width of its embeddings."""
        return self.teacher.dim

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embed prepared pictures.

        Args:
            pixels: float32 [pictures, 3, height, width], of :meth:`TeacherPreparation.prepare`.

        Returns:
            float32 [pictures, dim], unit rows, on the device of ``pixels``.
        """
        given = pixels.to(self.teacher.device, self.teacher.dtype)
        return self._rows(self.teacher.model.encode_image(given) if len(given) else None, pixels)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embed token rows, the padding cut away where that is exact.

        Args:
            tokens: int64 [texts, context], of :meth:`TeacherPreparation.tokens`.

        Returns:
            float32 [texts, dim], unit rows, on the device of ``tokens``.
        """
        given, model = tokens.to(self.teacher.device), self.teacher.model
        if not len(given):
            return self._rows(None, tokens)
        if self.teacher.cuts:
            return self._rows(context.encode(model, context.cut(model, given)), tokens)
        return self._rows(model.encode_text(given), tokens)

    def _rows(self, features: Tensor | None, like: Tensor) -> Tensor:
        # A tower without rows is not run: not every network takes an empty batch.
        if features is None:
            return torch.zeros(0, self.dim, device=like.device)
        return F.normalize(features.float(), dim=-1).to(like.device)
