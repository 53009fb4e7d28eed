"""Evaluation sets: pictures and texts, what answers what, their embeddings, and the directions that can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipdistill.core.errors import DataError
from clipdistill.data.records import Pair, Picture
from clipdistill.retrieval.exact import Ids, Vectors, check_unit


@dataclass(frozen=True)
class Judged:
    """An evaluation set with its ground truth.

    Attributes:
        name: ``test``, ``unseen``.
        pictures: The pictures; a row number means a place here.
        keys: Their keys.
        texts: Each text once, in order of first appearance.
        relevant_pictures: For each text the rows of the pictures that carry it; none for an unpaired text.
        relevant_texts: For each picture the rows of its texts; none for an unpaired picture.
    """

    name: str
    pictures: tuple[Picture, ...]
    keys: tuple[str, ...]
    texts: tuple[str, ...]
    relevant_pictures: tuple[tuple[int, ...], ...]
    relevant_texts: tuple[tuple[int, ...], ...]


def judged(name: str, pairs: Sequence[Pair]) -> Judged:
    """The ground truth of some pairs: a text is relevant to every picture that carries it.

    Equal texts are one query with several right answers, so that nobody is wrong for returning another picture of the
    same caption. Unpaired pictures and texts are searched among, and are no queries.

    Args:
        name: The set's name.
        pairs: Its rows.

    Raises:
        DataError: If two pictures have the same key.
    """
    rows: dict[str, int] = {}
    owners: list[list[int]] = []
    keys: dict[str, Picture] = {}
    relevant_texts: list[tuple[int, ...]] = []
    for pair in pairs:
        mine = dict.fromkeys(rows.setdefault(text, len(rows)) for text in pair.captions)
        owners.extend([] for _ in range(len(rows) - len(owners)))
        if pair.picture is None:
            continue
        if pair.key in keys:
            raise DataError(f"{name}: the key {pair.key!r} occurs twice; give each picture its own")
        for row in mine:
            owners[row].append(len(keys))
        keys[pair.key] = pair.picture
        relevant_texts.append(tuple(mine))
    return Judged(
        name=name,
        pictures=tuple(keys.values()),
        keys=tuple(keys),
        texts=tuple(rows),
        relevant_pictures=tuple(map(tuple, owners)),
        relevant_texts=tuple(relevant_texts),
    )


@dataclass(frozen=True)
class Embedded:
    """An evaluation set's embeddings.

    Attributes:
        images: Unit rows [pictures, dim].
        texts: Unit rows [texts, dim].
        fingerprint: Of the encoder that made them.
    """

    images: Vectors
    texts: Vectors
    fingerprint: str


@dataclass(frozen=True)
class Direction:
    """Which rows ask, which rows answer, and what is right.

    Attributes:
        name: ``text_to_image`` and so on.
        queries: Row numbers of the queries.
        names: The queries' names: texts, or keys.
        gallery: The gallery's names.
        relevant: For each query the right gallery rows; None where there is no ground truth.
    """

    name: str
    queries: Ids
    names: tuple[str, ...]
    gallery: tuple[str, ...]
    relevant: tuple[tuple[int, ...], ...] | None

    def query_vectors(self, embedded: Embedded) -> Vectors:
        """The embeddings of the rows that ask."""
        rows: Vectors = (embedded.texts if self.name.startswith("text") else embedded.images)[self.queries]
        return rows

    def gallery_vectors(self, embedded: Embedded) -> Vectors:
        """The embeddings of the rows that answer."""
        return embedded.texts if self.name.endswith("text") else embedded.images

    @property
    def finds_itself(self) -> bool:
        """Whether each query is a row of the gallery, and has to be left out of its own answer."""
        return self.name == "image_to_image"


def check_embedded(judged: Judged, embedded: Embedded) -> None:
    """Refuse embeddings that are not one unit row for each picture and each text of a set.

    Args:
        judged: The set.
        embedded: Its embeddings.

    Raises:
        DataError: Naming what differs, with both numbers.
    """
    parts = (("pictures", embedded.images, len(judged.keys)), ("texts", embedded.texts, len(judged.texts)))
    for what, rows, wanted in parts:
        if len(rows) != wanted:
            raise DataError(f"{judged.name}: {wanted} {what} and {len(rows)} embeddings of them. Encode the set again")
        if wanted:
            check_unit(rows, f"{judged.name}: embeddings of the {what}")


def directions_of(judged: Judged, *, labelled_only: bool) -> list[Direction]:
    """The directions that can be measured.

    A direction's queries are the rows that have an answer. Where none has, all rows are queries without ground truth,
    and only the agreement with a teacher can be measured.

    Args:
        judged: The set.
        labelled_only: Whether there is no teacher, so that ground truth is needed.

    Raises:
        DataError: If there are no pictures, or no ground truth where it is needed.
    """
    if not judged.pictures:
        raise DataError(f"{judged.name}: there are no pictures to search among")
    keys, texts = judged.keys, judged.texts
    if texts:
        found = [
            _direction("text_to_image", texts, keys, judged.relevant_pictures),
            _direction("image_to_text", keys, texts, judged.relevant_texts),
        ]
    else:
        found = [_direction("image_to_image", keys, keys, ((),) * len(keys))]
    if labelled_only and all(direction.relevant is None for direction in found):
        raise DataError(
            f"{judged.name}: no picture has a caption, so there is no ground truth. "
            "Give captions, or a teacher whose ranking is the reference"
        )
    return found


def _direction(
    name: str, queries: tuple[str, ...], gallery: tuple[str, ...], relevant: tuple[tuple[int, ...], ...]
) -> Direction:
    labelled = [row for row, answers in enumerate(relevant) if answers]
    rows = labelled or range(len(queries))
    return Direction(
        name=name,
        queries=np.asarray(rows, np.int64),
        names=tuple(queries[row] for row in rows),
        gallery=gallery,
        relevant=tuple(relevant[row] for row in rows) if labelled else None,
    )
