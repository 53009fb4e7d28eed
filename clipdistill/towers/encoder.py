"""The one protocol that evaluation, search and serving know: something that encodes pictures and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from clipdistill.data.records import Picture

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SearchedTeacher:
    """The teacher whose pictures a student without a picture tower searches.

    Attributes:
        name: What the teacher is called.
        fingerprint: Of the teacher: an index of its picture embeddings carries it.
    """

    name: str
    fingerprint: str


class Encoder(Protocol):
    """A dual encoder: pictures and texts in, unit vectors of one space out."""

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding: weights, preprocessing, tokenizer."""
        ...

    def encode_images(self, pictures: Sequence[Picture], batch: int = 64) -> Vectors:
        """Embed pictures.

        Args:
            pictures: What to embed.
            batch: How many go through the network at once; never changes a result beyond rounding.

        Returns:
            float32 of shape [len(pictures), dim], each row of unit length.

        Raises:
            DataError: If a picture cannot be decoded, naming it.
        """
        ...

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts: float32 of shape [len(texts), dim], each row of unit length."""
        ...
