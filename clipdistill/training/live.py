"""Teachers that run on each batch instead of lying in a cache: every turn of a picture may be a new view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

from PIL import Image
from torch import Tensor

from clipdistill.data.views import View
from clipdistill.losses.objective import Embeddings
from clipdistill.towers.ensemble import Ensemble
from clipdistill.towers.live import LiveTeacher
from clipdistill.training.batch import Batch


class LiveInput(Protocol):
    """How one live teacher's input is made."""

    def prepare(self, image: Image.Image) -> Tensor:
        """A decoded picture, cut to its view: float32 [3, height, width]."""
        ...

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Texts: int64 [texts, context]; each row depends on its text alone."""
        ...


class DrawnViews(Protocol):
    """Which views of a picture are shown."""

    @property
    def count(self) -> int:
        """1: always the whole picture; more: a new view at each turn."""
        ...

    def of(self, key: str, number: int) -> View:
        """The part of the picture that a view shows."""
        ...


class LiveRows(Protocol):
    """What training needs from teachers that run on each batch."""

    @property
    def inputs(self) -> Sequence[LiveInput]:
        """How each teacher's input is made, in the order of the batch's ``teacher_inputs``."""
        ...

    @property
    def drawn(self) -> DrawnViews:
        """Which views of the pictures teacher and student are shown."""
        ...

    def rows(self, batch: Batch) -> Embeddings:
        """The teachers' unit rows [images, D] and [texts, D] of a batch; attached where gradients are enabled."""
        ...


@final
class Live:
    """One teacher that runs on each batch: a :class:`LiveRows`.

    Args:
        teacher: The teacher.
        drawn: Which views of the pictures it is shown.
    """

    def __init__(self, teacher: LiveTeacher, drawn: DrawnViews) -> None:
        self.teacher, self.drawn = teacher, drawn
        self.inputs = (teacher.preparation,)

    def rows(self, batch: Batch) -> Embeddings:
        """The teacher's unit rows [images, D] and [texts, D] of a batch; attached where gradients are enabled."""
        (given,) = batch.teacher_inputs
        return Embeddings(self.teacher.embed_pixels(given.pixels), self.teacher.embed_tokens(given.tokens))


@final
class LiveEnsemble:
    """Several teachers that run on each batch and speak as one: a :class:`LiveRows`.

    Args:
        teachers: The teachers, in the order of the ensemble's members.
        ensemble: How their rows are combined.
        drawn: Which views of the pictures all of them are shown.
    """

    def __init__(self, teachers: Sequence[LiveTeacher], ensemble: Ensemble, drawn: DrawnViews) -> None:
        self.teachers, self.ensemble, self.drawn = tuple(teachers), ensemble, drawn
        self.inputs = tuple(teacher.preparation for teacher in self.teachers)

    def rows(self, batch: Batch) -> Embeddings:
        """The ensemble's unit rows [images, D] and [texts, D] of a batch; attached where gradients are enabled."""
        given = list(zip(self.teachers, batch.teacher_inputs, strict=True))
        images = [teacher.embed_pixels(own.pixels) for teacher, own in given]
        texts = [teacher.embed_tokens(own.tokens) for teacher, own in given]
        return Embeddings(self.ensemble.combine(images), self.ensemble.combine(texts))
