"""Search: a text or a picture in, the names of the nearest indexed rows out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.records import Picture
from clipdistill.retrieval.exact import Vectors
from clipdistill.retrieval.index import VectorIndex
from clipdistill.towers.encoder import Encoder

MOST_HITS = 1000


@dataclass(frozen=True, slots=True)
class Hit:
    """One found row.

    Attributes:
        rank: Its place, from 1.
        key: Its name.
        score: Its similarity to the query (cosine), higher is better.
    """

    rank: int
    key: str
    score: float


@final
class Searcher:
    """An encoder with an index of its own embeddings.

    Args:
        encoder: Makes the queries.
        index: Made by the same encoder.

    Raises:
        MismatchError: If another encoder made the index: its hits would look plausible, and mean nothing.
    """

    __slots__ = ("encoder", "index")

    def __init__(self, encoder: Encoder, index: VectorIndex) -> None:
        if encoder.fingerprint != index.encoder:
            remedy = "Search with the encoder that made the index, or build the index again with this one"
            raise MismatchError("index", "encoder", encoder.fingerprint, index.encoder, remedy)
        self.encoder = encoder
        self.index = index

    def by_text(self, text: str, k: int = 10) -> list[Hit]:
        """The rows nearest to a text, best first.

        Args:
            text: What is looked for.
            k: How many at most, 1 to 1000.

        Raises:
            DataError: If the text is empty.
            ValueError: If k is out of bounds.
        """
        _check_k(k)
        if not text.strip():
            raise DataError("the query is empty: give a few words")
        return self._hits(self.encoder.encode_texts([text]), k)

    def by_picture(self, picture: Picture, k: int = 10) -> list[Hit]:
        """The rows nearest to a picture, best first; the picture itself is one of them where it is indexed.

        Args:
            picture: What is looked for.
            k: How many at most, 1 to 1000.

        Raises:
            DataError: If the picture cannot be decoded.
            ValueError: If k is out of bounds.
        """
        _check_k(k)
        return self._hits(self.encoder.encode_images([picture]), k)

    def _hits(self, query: Vectors, k: int) -> list[Hit]:
        ranking = self.index.search(query, k)
        names = self.index.keys(ranking)[0]
        return [Hit(rank, key, float(ranking.scores[0, rank - 1])) for rank, key in enumerate(names, 1)]


def _check_k(k: int) -> None:
    if not 1 <= k <= MOST_HITS:
        raise ValueError(f"k must be from 1 to {MOST_HITS}: got {k}")
