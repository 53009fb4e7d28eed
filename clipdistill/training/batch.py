"""One step's input: pictures and texts for the student, the teacher's rows for them, and who belongs to whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipdistill.data.records import Rejection
from clipdistill.losses.batch import Embeddings


class RowFacts(Protocol):
    """What else is known of the rows, such as labels or stored inner blocks: arrays by name, row for row."""

    def of_images(self, keys: Sequence[str], views: Sequence[int]) -> Mapping[str, npt.NDArray[np.generic]]:
        """Facts of these views of these pictures: each array's first axis has one place a picture."""
        ...

    def of_texts(self, texts: Sequence[str]) -> Mapping[str, npt.NDArray[np.generic]]:
        """Facts of these texts: each array's first axis has one place a text."""
        ...


@dataclass(frozen=True, slots=True)
class TeacherInput:
    """A batch as one live teacher takes it, row for row with the batch's own pictures and texts.

    Attributes:
        pixels: float32 [images, 3, height, width], by the teacher's own transform.
        tokens: int64 [texts, context], by the teacher's own tokenizer.
    """

    pixels: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input. The first ``pairs`` pictures and texts belong together, row by row; the others are unpaired.

    Attributes:
        step: The step, counted from 0.
        pixels: float32 [images, 3, height, width]; [images, 3, 0, 0] for a student without a picture tower.
        tokens: int64 [texts, length].
        teacher_images: float32 [images, D], unit rows; [images, 0] before a live teacher has embedded the batch.
        teacher_texts: float32 [texts, D], unit rows; [texts, 0] before a live teacher has.
        positives: bool [pairs, pairs]; [i, j] where text j is a caption of picture i.
        pairs: How many rows are paired.
        keys: Of the pictures.
        texts: The texts themselves.
        rejected: Pictures that could not be read; their rows, and their paired texts, are left out of all the above.
        image_facts: Further tensors by name, row for row with the pictures.
        text_facts: Further tensors by name, row for row with the texts.
        teacher_inputs: The same pictures, in the same views, and the same texts as each live teacher takes them.
        queue: Further rows of the teacher, the same for every part of the batch, or None.
    """

    step: int
    pixels: Tensor
    tokens: Tensor
    teacher_images: Tensor
    teacher_texts: Tensor
    positives: Tensor
    pairs: int
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    rejected: tuple[Rejection, ...]
    image_facts: Mapping[str, Tensor] = field(default_factory=dict)
    text_facts: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_inputs: tuple[TeacherInput, ...] = ()
    queue: Embeddings | None = None

    @property
    def samples(self) -> int:
        """How many rows: a pair counts once."""
        return len(self.keys) + len(self.texts) - self.pairs

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors = ("pixels", "tokens", "teacher_images", "teacher_texts", "positives")
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in tensors}
        for name in ("image_facts", "text_facts"):
            moved[name] = {key: value.to(device, non_blocking=True) for key, value in getattr(self, name).items()}
        moved["teacher_inputs"] = tuple(
            TeacherInput(one.pixels.to(device, non_blocking=True), one.tokens.to(device, non_blocking=True))
            for one in self.teacher_inputs
        )
        if self.queue is not None:
            sides = (self.queue.images, self.queue.texts)
            moved["queue"] = Embeddings(*(side.to(device, non_blocking=True) for side in sides))
        return replace(self, **moved)

    def parts(self, count: int) -> Iterator[Batch]:
        """Cut the batch into parts: pairs, further pictures and further texts each as evenly as they divide.

        Args:
            count: How many parts; fewer are made where there are fewer rows of a kind.
        """
        kinds = (self.pairs, len(self.keys) - self.pairs, len(self.texts) - self.pairs)
        count = min([count, *(rows for rows in kinds if rows)])
        if count <= 1:
            yield self
            return
        for part in range(count):
            pairs, images, texts = (range(part * rows // count, (part + 1) * rows // count) for rows in kinds)
            yield self._part(list(pairs), [self.pairs + row for row in images], [self.pairs + row for row in texts])

    def _part(self, pairs: list[int], images: list[int], texts: list[int]) -> Batch:
        images, texts = pairs + images, pairs + texts
        return Batch(
            step=self.step,
            pixels=self.pixels[images],
            tokens=self.tokens[texts],
            teacher_images=self.teacher_images[images],
            teacher_texts=self.teacher_texts[texts],
            positives=self.positives[pairs][:, pairs],
            pairs=len(pairs),
            keys=tuple(self.keys[row] for row in images),
            texts=tuple(self.texts[row] for row in texts),
            rejected=(),
            image_facts={name: value[images] for name, value in self.image_facts.items()},
            text_facts={name: value[texts] for name, value in self.text_facts.items()},
            teacher_inputs=tuple(TeacherInput(one.pixels[images], one.tokens[texts]) for one in self.teacher_inputs),
            queue=self.queue,
        )
