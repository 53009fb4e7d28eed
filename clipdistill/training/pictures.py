"""The pictures of a batch: read, checked against the cache, decoded, cut to their view and resized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from clipdistill.core import fingerprint
from clipdistill.core.errors import MismatchError
from clipdistill.data.pictures import PictureError, decode
from clipdistill.data.records import Pair, Picture, Rejection
from clipdistill.data.views import View, apply

Pixels = npt.NDArray[np.uint8]
Transform = Callable[[Image.Image], Tensor]
_BLANK = Image.new("RGB", (8, 8))


class Preparation(Protocol):
    """What the batches need from a student's preprocessing."""

    def pixels(self, image: Image.Image) -> Pixels:
        """Resize and crop an RGB picture: uint8 [height, width, 3]."""
        ...

    def normalise(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """The tower's input: float32 [..., 3, height, width]."""
        ...


class PictureFacts(Protocol):
    """What a teacher cache knows about the pictures that its rows were made from."""

    def view(self, key: str, number: int) -> View:
        """The part of a picture that the teacher saw."""
        ...

    def mark(self, key: str) -> str | None:
        """:func:`clipdistill.core.fingerprint.of_bytes` of the picture; None where it is not known."""
        ...


@dataclass(frozen=True, slots=True)
class ChangedPicture:
    """A picture that is not the one that the teacher's row was made from.

    Attributes:
        key: The pair's key.
        origin: Where the picture was read.
        expected: The mark in the cache.
        found: The mark of the bytes that were read.
    """

    key: str
    origin: str
    expected: str
    found: str

    def error(self) -> MismatchError:
        """What to raise; made late, because this record crosses from a worker process and that error cannot."""
        remedy = "The picture changed since the cache was made: put it back, or make the cache again."
        return MismatchError(f"{self.key} ({self.origin})", "picture", self.expected, self.found, remedy)


@dataclass(frozen=True, slots=True)
class ReadPictures:
    """A batch's pictures as the student takes them.

    Attributes:
        pixels: float32 [read, 3, height, width].
        places: Which of the rows asked for these are.
        rejected: The others, with their reasons.
        changed: A picture that must not be trained on; then nothing else here is meant to be used.
        teacher_pixels: The same pictures as each live teacher takes them: float32 [read, 3, height, width].
    """

    pixels: Tensor
    places: list[int]
    rejected: list[Rejection]
    changed: ChangedPicture | None = None
    teacher_pixels: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One picture as the student takes it, before normalisation, and as each live teacher does."""

    pixels: Pixels
    teachers: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes + sum(one.nbytes for one in self.teachers)


def unread_pictures(count: int) -> ReadPictures:
    """So many pictures that nobody looks at, where the student has no picture tower: rows [count, 3, 0, 0]."""
    return ReadPictures(torch.empty(count, 3, 0, 0), list(range(count)), [])


@final
class PictureReader:
    """Reads pictures as the student sees them, and keeps the whole ones in memory as far as there is room.

    A picture is decoded once and cut to its view once, whoever looks at it.

    Once the memory is full nothing is dropped from it: each picture comes once an epoch, so that dropping the oldest
    would drop each just before it comes again.

    Args:
        preprocess: The student's preprocessing.
        facts: The teacher cache.
        max_pixels: A picture whose header says more is refused.
        keep_bytes: How many bytes of prepared pictures may be kept; 0 = none.
        teachers: Each live teacher's own transform.
    """

    def __init__(
        self,
        preprocess: Preparation,
        facts: PictureFacts,
        max_pixels: int,
        keep_bytes: int = 0,
        teachers: Sequence[Transform] = (),
    ) -> None:
        self._preprocess, self._facts, self._max_pixels = preprocess, facts, max_pixels
        self._teachers = tuple(teachers)
        self._kept: dict[str, _Prepared] = {}
        self._room = keep_bytes

    def read(self, rows: Sequence[tuple[Pair, int]]) -> ReadPictures:
        """Prepare a batch's pictures.

        Args:
            rows: Each with the number of the view to show.
        """
        pictures: list[_Prepared] = []
        places: list[int] = []
        rejected: list[Rejection] = []
        changed: ChangedPicture | None = None
        for place, (pair, view) in enumerate(rows):
            try:
                prepared = self._prepared(pair, view)
            except PictureError as fault:
                rejected.append(Rejection(pair.key, fault.reason, fault.origin))
                continue
            if isinstance(prepared, ChangedPicture):
                changed = prepared
                break
            pictures.append(prepared)
            places.append(place)
        return ReadPictures(self._stacked(pictures), places, rejected, changed, self._stacked_for_teachers(pictures))

    def _stacked(self, pictures: Sequence[_Prepared]) -> Tensor:
        # A blank picture lends its shape to a batch without any.
        shown = [one.pixels for one in pictures] or [self._preprocess.pixels(_BLANK)]
        return torch.from_numpy(self._preprocess.normalise(np.stack(shown)[: len(pictures)]))

    def _stacked_for_teachers(self, pictures: Sequence[_Prepared]) -> tuple[Tensor, ...]:
        shown = [one.teachers for one in pictures] or [tuple(transform(_BLANK) for transform in self._teachers)]
        return tuple(torch.stack(column)[: len(pictures)] for column in zip(*shown, strict=True))

    def _prepared(self, pair: Pair, view: int) -> _Prepared | ChangedPicture:
        kept = self._kept.get(pair.key) if view == 0 else None
        if kept is not None:
            return kept
        picture = pair.picture or Picture(pair.key)
        data = _bytes(picture)
        expected = self._facts.mark(pair.key)
        if expected is not None and (found := fingerprint.of_bytes(data)) != expected:
            return ChangedPicture(pair.key, picture.origin, expected, found)
        image = decode(data, self._max_pixels, picture.origin)
        image = image if view == 0 else apply(image, self._facts.view(pair.key, view))
        prepared = _Prepared(self._preprocess.pixels(image), tuple(transform(image) for transform in self._teachers))
        if view == 0 and prepared.nbytes <= self._room:
            self._room -= prepared.nbytes
            self._kept[pair.key] = prepared
        return prepared


def _bytes(picture: Picture) -> bytes:
    try:
        return picture.read()
    except OSError as fault:
        raise PictureError(f"unreadable file: {fault.strerror or fault}", picture.origin) from fault
