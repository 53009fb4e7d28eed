"""The classification task in the training loop: its two losses, and the labels of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipdistill.losses.classification import class_distillation_loss, class_label_loss, class_logits
from clipdistill.losses.objective import MAX_SCALE, Embeddings, ExtraTerm
from clipdistill.towers.encoder import Vectors
from clipdistill.towers.student import DualEncoder
from clipdistill.training.batch import Batch

LABELS = "class"
"""The name under which a batch holds the number of each picture's class."""


@final
class ClassLabels:
    """The labels as facts of a batch's pictures: :class:`~clipdistill.training.batch.RowFacts`.

    Args:
        numbers: The number of its class by a picture's key; a picture that is not here has no known class.
        unknown: The number that stands for that; below 0.
    """

    def __init__(self, numbers: Mapping[str, int], unknown: int = -1) -> None:
        self._numbers, self._unknown = numbers, unknown

    def of_images(self, keys: Sequence[str], views: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
        """int64 [keys]: each picture's class, the same in every view."""
        return {LABELS: np.asarray([self._numbers.get(key, self._unknown) for key in keys], np.int64)}

    def of_texts(self, texts: Sequence[str]) -> dict[str, npt.NDArray[np.generic]]:
        """Nothing: texts have no class here."""
        return {}


@final
class ClassScale(nn.Module):
    """The inverse temperature of the student's class logits, learned with it as a logarithm.

    It begins at the teacher's, where a student that embeds as the teacher does has the teacher's probabilities, and is
    held at CLIP's bound, or at the teacher's own where that is higher.

    Args:
        start: The teacher's exp(logit_scale).
        classes: float32 [classes, D], the teacher's class vectors; not a part of the state, as they never change.
    """

    def __init__(self, start: float, classes: Vectors) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(start)))
        self.classes: Tensor
        self.register_buffer("classes", torch.tensor(classes, dtype=torch.float32), persistent=False)
        self._most = math.log(max(MAX_SCALE, start))

    def forward(self) -> Tensor:
        """The scale, differentiably."""
        with torch.no_grad():  # the parameter itself is held, or a scale at the bound could never come down again
            self.logit_scale.clamp_(max=self._most)
        return self.logit_scale.exp()

    def value(self) -> float:
        """The scale as a number."""
        return math.exp(min(self.logit_scale.item(), self._most))


@final
class ClassLoss:
    """The terms ``class_distil`` and ``class_labels``: an :class:`~clipdistill.training.run.ExtraLoss`.

    The student's pictures are compared with the teacher's class vectors in the teacher's space, so that no prompt goes
    through the student's text tower.

    Args:
        classes: float32 [classes, D], the teacher's class vectors, unit rows.
        scale: The teacher's exp(logit_scale).
        temperature: T of the distillation.
        distil: Weight of the divergence from the teacher's class probabilities; 0 leaves it out.
        labels: Weight of the cross entropy with the labels; 0 leaves it out.
    """

    def __init__(self, classes: Vectors, scale: float, *, temperature: float, distil: float, labels: float) -> None:
        self.scale = ClassScale(scale, classes)
        self._teacher_scale, self._temperature = scale, temperature
        self._distil, self._labels = distil, labels

    @property
    def learned(self) -> nn.Module:
        """The scale of the student's class logits."""
        return self.scale

    def watching(self, student: DualEncoder) -> AbstractContextManager[object]:
        """Nothing is watched."""
        return nullcontext()

    def terms(self, student: DualEncoder, batch: Batch, embedded: Embeddings) -> Iterator[ExtraTerm]:
        """The terms that are weighted and have rows: of all pictures the first, of the labelled ones the second."""
        if not len(embedded.images):
            return
        classes = self.scale.classes
        own = class_logits(student.to_teacher(embedded.images, "image").float(), classes, self.scale())
        if self._distil:
            teacher = class_logits(batch.teacher_images, classes, self._teacher_scale)
            yield ExtraTerm("class_distil", self._distil, class_distillation_loss(own, teacher, self._temperature))
        labels = batch.image_facts[LABELS]
        if self._labels and bool((labels >= 0).any()):
            yield ExtraTerm("class_labels", self._labels, class_label_loss(own, labels))
