"""The rows that a compression embeds: the sets that are searched and the pictures of the index, for any encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from clipdistill.cache import AnyCache
from clipdistill.compression import Asked, Sides
from clipdistill.config import evaluation_sets
from clipdistill.core.errors import DataError
from clipdistill.data.records import Pair
from clipdistill.evaluation import judged
from clipdistill.retrieval.exact import Vectors
from clipdistill.search import QuerySide
from clipdistill.stages.index import indexed_pairs
from clipdistill.stages.inputs import RunData
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.encoder import Encoder
from clipdistill.towers.student import DualEncoder

VAL = "val"
_FITTED = 4096
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What every form of the student embeds.

    Attributes:
        asked: The sets by name, ``val`` first.
        pairs: Their rows.
        texts: Of each set the texts that have an answer.
        indexed: The rows of the shipped index.
        keys: Their names.
        data: All rows of the run.
        cache: The teacher's embeddings.
        stored: Whether the pictures are the teacher's own, whose embeddings are stored: of a text tower alone.
    """

    asked: Mapping[str, Asked]
    pairs: Mapping[str, tuple[Pair, ...]]
    texts: Mapping[str, tuple[str, ...]]
    indexed: tuple[Pair, ...]
    keys: tuple[str, ...]
    data: RunData
    cache: AnyCache
    stored: bool

    @staticmethod
    def of(workspace: Workspace, data: RunData, cache: AnyCache, student: DualEncoder) -> Rows:
        """The rows of a run.

        Raises:
            DataError: If a set has no texts to ask with, or there are no pictures to index.
        """
        pairs = {name: data.sets[name].pairs for name in dict.fromkeys((VAL, *evaluation_sets(workspace.config)))}
        indexed = tuple(indexed_pairs(workspace, data))
        if not indexed:
            raise DataError("index.sets: hold no pictures to index")
        asked = {name: _asked(name, rows, cache) for name, rows in pairs.items()}
        return Rows(
            asked={name: one for name, (one, _) in asked.items()},
            pairs=pairs,
            texts={name: texts for name, (_, texts) in asked.items()},
            indexed=indexed,
            keys=tuple(pair.key for pair in indexed),
            data=data,
            cache=cache,
            stored=student.searches is not None,
        )

    def pictures(self, encoder: Encoder) -> Pictures:
        """The pictures as an encoder embeds them; of a text tower alone the teacher's stored ones."""
        if self.stored:
            return Pictures(lambda rows: self.cache.image_rows([pair.key for pair in rows]))
        return Pictures(lambda rows: encoder.encode_images([pair.picture for pair in rows if pair.picture]))

    def embedded(self, encoder: Encoder, pictures: Pictures | None = None) -> tuple[dict[str, Sides], Vectors]:
        """The embeddings of the sets by name, and those of the index's rows."""
        shown = pictures or self.pictures(encoder)
        sides = {
            name: Sides(encoder.encode_texts(self.texts[name]), shown.of(rows)) for name, rows in self.pairs.items()
        }
        return sides, shown.of(self.indexed)

    def fitted(self, encoder: Encoder, pictures: Pictures) -> Vectors:
        """The embeddings whose principal axes are taken: of training pictures and of their texts, evenly spread.

        Raises:
            DataError: If there are no training pictures.
        """
        pairs = self.data.sets["train"].pairs if "train" in self.data.sets else ()
        rows = [*(pair for pair in pairs if pair.picture is not None), *self.data.images]
        if not rows:
            raise DataError('compress.rotations: "pca" needs training pictures; give data.train, or set ["leading"]')
        texts = list(dict.fromkeys(text for pair in pairs for text in pair.captions)) or list(self.data.texts)
        return np.concatenate([pictures.of(_spread(rows)), encoder.encode_texts(_spread(texts))])


class Pictures:
    """The embeddings of pictures, each embedded once.

    Args:
        embed: Makes the unit rows of some pairs that have pictures.
    """

    def __init__(self, embed: Callable[[Sequence[Pair]], Vectors]) -> None:
        self._embed = embed
        self._rows: dict[str, Vectors] = {}

    def of(self, pairs: Sequence[Pair]) -> Vectors:
        """Those of the pairs that have a picture: unit rows in the pairs' order."""
        shown = [pair for pair in pairs if pair.picture is not None]
        missing = list({pair.key: pair for pair in shown if pair.key not in self._rows}.values())
        if missing:
            self._rows |= {pair.key: row for pair, row in zip(missing, self._embed(missing), strict=True)}
        return np.stack([self._rows[pair.key] for pair in shown]).astype(np.float32, copy=False)


def asking(student: DualEncoder) -> Encoder:
    """A student as the encoder of its index: the teacher's index for a text tower alone."""
    return student if student.searches is None else QuerySide(student)


def _asked(name: str, pairs: tuple[Pair, ...], cache: AnyCache) -> tuple[Asked, tuple[str, ...]]:
    """A set's texts that have an answer asking for its pictures, and these texts."""
    rows = judged(name, pairs)
    places = [place for place, answers in enumerate(rows.relevant_pictures) if answers]
    if not places or not rows.keys:
        raise DataError(f"{name}: no picture has a caption; the recall budget is measured from texts to pictures")
    texts = tuple(rows.texts[place] for place in places)
    teacher = Sides(cache.text_rows(texts), cache.image_rows(rows.keys))
    return Asked(name, rows.keys, tuple(rows.relevant_pictures[place] for place in places), teacher), texts


def _spread(rows: Sequence[Row]) -> list[Row]:
    step = max(1, -(-len(rows) // _FITTED))
    return list(rows[::step])
