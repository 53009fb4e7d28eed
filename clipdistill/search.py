"""Search: a text or a picture in, the names of the nearest indexed rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.records import Picture
from clipdistill.retrieval.exact import Vectors
from clipdistill.retrieval.index import VectorIndex
from clipdistill.towers.encoder import Encoder, SearchedTeacher

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


class TextStudent(Protocol):
    """What :class:`QuerySide` needs of a student."""

    @property
    def searches(self) -> SearchedTeacher | None:
        """The teacher whose pictures it searches; None where it has a picture tower of its own."""
        ...

    @property
    def teacher_dim(self) -> int:
        """The width of the teacher's embeddings."""
        ...

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts, in the student's own width."""
        ...

    def to_teacher_vectors(self, vectors: Vectors, side: Literal["image", "text"]) -> Vectors:
        """Map embeddings to the teacher's space."""
        ...


@final
class QuerySide:
    """A text tower that asks in its teacher's space: an :class:`~clipdistill.towers.encoder.Encoder` for its index.

    Its fingerprint is the teacher's, because that is what made the pictures' vectors. So an index that was built from
    the teacher long before there was a student is searched as it lies::

        student = DualEncoder.load("runs/NAME/student")
        index = VectorIndex.load("the/teachers/index", encoder=student.searches.fingerprint)
        Searcher(QuerySide(student), index).by_text("a red bicycle")

    and vectors of another origin become one with
    ``VectorIndex.build(vectors, keys, encoder=student.searches.fingerprint)``.

    Args:
        student: A student without a picture tower.
        teacher: The live teacher, for pictures; None where pictures are not to be embedded.

    Raises:
        DataError: If the student has a picture tower of its own: its vectors are not the teacher's.
        MismatchError: If the teacher is not the one that the student searches.
    """

    __slots__ = ("_searches", "_student", "_teacher")

    def __init__(self, student: TextStudent, teacher: Encoder | None = None) -> None:
        if student.searches is None:
            raise DataError(
                "the student has a picture tower of its own: its vectors are not the teacher's. Search the index that "
                "was built with the student"
            )
        if teacher is not None and teacher.fingerprint != student.searches.fingerprint:
            remedy = f"Give the teacher that the student was trained for ({student.searches.name})"
            raise MismatchError("teacher", "fingerprint", student.searches.fingerprint, teacher.fingerprint, remedy)
        self._student, self._searches, self._teacher = student, student.searches, teacher

    @property
    def dim(self) -> int:
        """The width of the teacher's embeddings."""
        return self._student.teacher_dim

    @property
    def fingerprint(self) -> str:
        """The teacher's."""
        return self._searches.fingerprint

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts with the student, in the teacher's space: float32 [len(texts), dim], unit rows."""
        return self._student.to_teacher_vectors(self._student.encode_texts(texts, batch), "text")

    def encode_images(self, pictures: Sequence[Picture], batch: int = 64) -> Vectors:
        """Embed pictures with the teacher: float32 [len(pictures), dim], unit rows.

        Raises:
            DataError: If a picture cannot be decoded, or the teacher is not at hand.
        """
        if self._teacher is None:
            raise DataError(
                f"pictures are embedded by the teacher {self._searches.name}, which is not at hand: the student has a "
                "text tower alone. Search with words, or give the teacher itself (teacher.model in the run's "
                "configuration)"
            )
        return self._teacher.encode_images(pictures, batch)


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
        return self.by_vector(self.encoder.encode_texts([text])[0], k)

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
        return self.by_vector(self.encoder.encode_images([picture])[0], k)

    def by_vector(self, query: Vectors, k: int = 10) -> list[Hit]:
        """The rows nearest to a query that the encoder has embedded already, best first.

        Args:
            query: A unit vector [dim].
            k: How many at most, 1 to 1000.

        Raises:
            ValueError: If k is out of bounds.
        """
        _check_k(k)
        ranking = self.index.search(query[None], k)
        names = self.index.keys(ranking)[0]
        return [Hit(rank, key, float(ranking.scores[0, rank - 1])) for rank, key in enumerate(names, 1)]


def _check_k(k: int) -> None:
    if not 1 <= k <= MOST_HITS:
        raise ValueError(f"k must be from 1 to {MOST_HITS}: got {k}")
