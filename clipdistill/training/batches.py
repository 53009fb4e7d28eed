"""From the data to the batch of a step: which rows, which caption, which view, and the teacher's embeddings of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipdistill.config import TrainConfig
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.records import Pair
from clipdistill.data.views import View
from clipdistill.training.batch import Batch, RowFacts, TeacherInput
from clipdistill.training.live import DrawnViews, LiveRows
from clipdistill.training.pictures import PictureReader, Preparation, ReadPictures, unread_pictures
from clipdistill.training.queue import Queue
from clipdistill.training.sampler import Stream, choose

KEPT_BYTES = 512 << 20
"""Bytes of prepared pictures that are kept in memory, so that later epochs decode nothing; only without workers."""
_KEPT_TEXTS = 1 << 20

Vectors = npt.NDArray[np.float32]
Row = TypeVar("Row")


class TeacherRows(Protocol):
    """What training needs from a teacher cache."""

    @property
    def dim(self) -> int:
        """The width of the teacher's embeddings."""
        ...

    @property
    def scale(self) -> float:
        """The teacher's exp(logit_scale)."""
        ...

    @property
    def bias(self) -> float | None:
        """The teacher's SigLIP bias, or None."""
        ...

    @property
    def views(self) -> int:
        """How many views of each picture there are; view 0 is the whole picture."""
        ...

    def image_rows(self, keys: Sequence[str], views: Sequence[int]) -> Vectors:
        """The teacher's unit rows [len(keys), dim] of these views of these pictures."""
        ...

    def text_rows(self, texts: Sequence[str]) -> Vectors:
        """The teacher's unit rows [len(texts), dim] of these texts."""
        ...

    def view(self, key: str, number: int) -> View:
        """The part of a picture that the teacher saw."""
        ...

    def mark(self, key: str) -> str | None:
        """:func:`clipdistill.core.fingerprint.of_bytes` of the picture; None where it is not known."""
        ...


class Tokenizer(Protocol):
    """What the batches need from a student's tokenizer."""

    def encode(self, texts: Sequence[str], *, cut: bool = True) -> npt.NDArray[np.int64]:
        """Token ids [texts, length], padded with 0 behind each text's end."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """The rows to train on.

    Attributes:
        pairs: Pictures with their captions.
        weights: How often each pair is drawn against the others; empty = equally often.
        images: Further pictures; their captions are not used.
        texts: Further texts.
        image_weights: How often each further picture is drawn against the others and the pairs; empty = as 1.0.
        text_weights: The same of the further texts.
    """

    pairs: tuple[Pair, ...]
    weights: tuple[float, ...] = ()
    images: tuple[Pair, ...] = ()
    texts: tuple[str, ...] = ()
    image_weights: tuple[float, ...] = ()
    text_weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which rows a step has: pictures with their views, and texts; the first ``pairs`` of each belong together."""

    pictures: list[tuple[Pair, int]]
    texts: list[str]
    pairs: int


@dataclass(frozen=True, slots=True)
class _LivePictures:
    """The views that a live teacher is shown, and the marks of the pictures that the cache knows."""

    drawn: DrawnViews
    cache: TeacherRows

    def view(self, key: str, number: int) -> View:
        return self.drawn.of(key, number)

    def mark(self, key: str) -> str | None:
        return self.cache.mark(key)


@final
class BatchMaker:
    """Makes the batch of any step: a pure function of the data, the seed and the step.

    From a cache the batch holds the teacher's stored rows; for a live teacher it holds what that teacher is to embed.
    A live teacher is not bound to stored views: where it is shown more than the whole picture, each turn of a picture
    is a view that was never drawn before.

    Args:
        preprocess: The student's preprocessing; None where it has no picture tower: then no picture is read.
        tokenizer: The student's tokenizer.
        cache: The teacher's rows; beside a live teacher only the marks of its pictures are used.
        data: What to train on.
        train: How many rows a step has.
        seed: The run's seed.
        max_pixels: A picture whose header says more is refused.
        keep_bytes: How many bytes of prepared pictures are kept in memory.
        facts: What else the batches hold of their rows.
        live: The teachers that run on each batch; None where their rows are stored.
        queue_rows: How many of the teacher's stored pictures and texts each batch brings beside its own; 0 = none.

    Raises:
        ConfigError: If a batch of a kind of rows is asked for that the data do not have, or a queue of such.
        DataError: If a pair has no picture or no caption, or the weights are not one a pair.
    """

    def __init__(
        self,
        preprocess: Preparation | None,
        tokenizer: Tokenizer,
        cache: TeacherRows,
        data: TrainingData,
        train: TrainConfig,
        seed: int,
        *,
        max_pixels: int,
        keep_bytes: int = 0,
        facts: Sequence[RowFacts] = (),
        live: LiveRows | None = None,
        queue_rows: int = 0,
    ) -> None:
        _check(data)
        self._cache, self._seed, self._facts = cache, seed, tuple(facts)
        # Not the live teachers themselves: a process that decodes pictures has no use for their weights.
        self._live, self._inputs = live is not None, tuple(live.inputs) if live is not None else ()
        self._views = cache.views if live is None else live.drawn.count
        shown = cache if live is None else _LivePictures(live.drawn, cache)
        transforms = [one.prepare for one in self._inputs]
        self._reader = None
        if preprocess is not None:
            self._reader = PictureReader(preprocess, shown, max_pixels, keep_bytes, transforms)
        self._tokenizer = tokenizer
        self._tokens: dict[str, npt.NDArray[np.int32]] = {}
        self._pairs = data.pairs
        images = _weighted_pictures(data) if train.batch_images else {}
        texts = _weighted_texts(data) if train.batch_texts else {}
        self._images, self._texts = [pair for pair, _ in images.values()], list(texts)
        kinds: dict[str, tuple[int, int, Sequence[float]]] = {
            "batch": (train.batch, len(data.pairs), data.weights),
            "batch_images": (train.batch_images, len(images), [weight for _, weight in images.values()]),
            "batch_texts": (train.batch_texts, len(texts), list(texts.values())),
        }
        self._streams = {
            name: Stream(name, rows, batch, seed, weights)
            for name, (batch, rows, weights) in kinds.items()
            if _wanted(name, batch, rows)
        }
        self._queue = _new_queue(cache, data, train, seed, queue_rows) if queue_rows else None

    def epoch(self, steps: int) -> float:
        """How many epochs so many steps are: of the pairs, or without pairs of the pictures, or of the texts."""
        return next(iter(self._streams.values())).epoch(steps)

    def make_batch(self, step: int) -> Batch:
        """Make the batch of a step, counted from 0.

        Raises:
            MismatchError: If a picture is not the one that the teacher's row was made from.
        """
        return self._finished(step, self.read_pictures(step))

    def batches(self, first: int, last: int, workers: int = 0) -> Iterator[Batch]:
        """The batches of the steps from ``first`` up to and without ``last``, in order.

        Args:
            first: The first step.
            last: The end.
            workers: Processes that decode pictures ahead; never changes a batch.

        Raises:
            MismatchError: As :meth:`make_batch`.
        """
        if workers == 0:
            yield from map(self.make_batch, range(first, last))
            return
        # Only pictures are made ahead: texts and the teacher's rows are look-ups, best made where their caches are.
        generator = torch.Generator().manual_seed(0)  # or the loader would take a number from the ambient one
        loader = DataLoader(_Steps(self, first, last), batch_size=None, num_workers=workers, generator=generator)
        yield from map(self._finished, range(first, last), loader)

    def read_pictures(self, step: int) -> ReadPictures:
        """The part of a batch that is worth a process of its own."""
        pictures = self._plan(step).pictures
        return unread_pictures(len(pictures)) if self._reader is None else self._reader.read(pictures)

    def _finished(self, step: int, pictures: ReadPictures) -> Batch:
        if pictures.changed is not None:
            raise pictures.changed.error()
        plan = self._plan(step)
        paired = [place for place in pictures.places if place < plan.pairs]
        rows = [plan.pictures[place] for place in pictures.places]
        texts = [plan.texts[place] for place in paired] + plan.texts[plan.pairs :]
        keys, views = [pair.key for pair, _ in rows], [view for _, view in rows]
        return Batch(
            step=step,
            pixels=pictures.pixels,
            tokens=self._encoded(texts),
            teacher_images=self._stored(len(rows), lambda: self._cache.image_rows(keys, views)),
            teacher_texts=self._stored(len(texts), lambda: self._cache.text_rows(texts)),
            positives=_positives([pair for pair, _ in rows[: len(paired)]], texts[: len(paired)]),
            pairs=len(paired),
            keys=tuple(keys),
            texts=tuple(texts),
            rejected=tuple(pictures.rejected),
            image_facts=_merged([known.of_images(keys, views) for known in self._facts] if rows else []),
            text_facts=_merged([known.of_texts(texts) for known in self._facts] if texts else []),
            teacher_inputs=tuple(
                TeacherInput(pixels, one.tokens(texts))
                for one, pixels in zip(self._inputs, pictures.teacher_pixels, strict=True)
            ),
            queue=None if self._queue is None else self._queue.draw(step),
        )

    def _plan(self, step: int) -> _Plan:
        draws = {name: stream.draw(step) for name, stream in self._streams.items()}
        pictures: list[tuple[Pair, int]] = []
        texts: list[str] = []
        for draw in draws.get("batch", ()):
            pair = self._pairs[draw.row]
            pictures.append((pair, self._view("batch", pair, draw.turn)))
            texts.append(pair.captions[choose(len(pair.captions), draw.turn, self._seed, "caption", pair.key)])
        pairs = len(texts)
        for draw in draws.get("batch_images", ()):
            pair = self._images[draw.row]
            pictures.append((pair, self._view("batch_images", pair, draw.turn)))
        texts += [self._texts[draw.row] for draw in draws.get("batch_texts", ())]
        return _Plan(pictures, texts, pairs)

    def _view(self, stream: str, pair: Pair, turn: int) -> int:
        views = self._views
        if self._live and views > 1:  # never twice the same: the streams take the odd and the even numbers
            return 2 * turn + (1 if stream == "batch" else 2)
        # One more step aside each round, or a picture with as many captions as views would always show the same two.
        return choose(views, turn + turn // views, self._seed, "view", stream, pair.key)

    def _stored(self, count: int, read: Callable[[], Vectors]) -> Tensor:
        """The teacher's stored rows; of width 0 where a live teacher is still to make them."""
        if self._live:
            return torch.zeros(count, 0)
        return torch.tensor(read() if count else np.empty((0, self._cache.dim), np.float32), dtype=torch.float32)

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        """Token ids [texts, length of the longest], each text encoded once and kept."""
        if len(self._tokens) > _KEPT_TEXTS:
            self._tokens.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            for text, row in zip(new, self._tokenizer.encode(new, cut=True), strict=True):
                self._tokens[text] = row[: int(np.flatnonzero(row)[-1]) + 1].astype(np.int32)
        rows = [self._tokens[text] for text in texts]
        tokens = np.zeros((len(rows), max(map(len, rows), default=1)), np.int64)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = row
        return torch.from_numpy(tokens)


@final
class _Steps(Dataset[Any]):
    """The steps of a run as the data set of torch's loader."""

    def __init__(self, maker: BatchMaker, first: int, last: int) -> None:
        self._maker, self._first, self._last = maker, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> ReadPictures:
        return self._maker.read_pictures(self._first + index)


def _new_queue(cache: TeacherRows, data: TrainingData, train: TrainConfig, seed: int, rows: int) -> Queue:
    keys, texts = list(_weighted_pictures(data)), list(_weighted_texts(data))
    images, sentences = train.batch + train.batch_images > 0, train.batch + train.batch_texts > 0
    return Queue(cache, keys, texts, rows, seed, images=images, sentences=sentences)


def _merged(parts: Sequence[Mapping[str, npt.NDArray[np.generic]]]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for part in parts for name, value in part.items()}


def _positives(pairs: Sequence[Pair], texts: Sequence[str]) -> Tensor:
    columns: dict[str, list[int]] = {}
    for column, text in enumerate(texts):
        columns.setdefault(text, []).append(column)
    positives = np.zeros((len(pairs), len(texts)), np.bool_)
    for row, pair in enumerate(pairs):
        for caption in pair.captions:
            positives[row, columns.get(caption, [])] = True
    return torch.from_numpy(positives)


def _weighted_pictures(data: TrainingData) -> dict[str, tuple[Pair, float]]:
    """Each picture once, by its key, with its weight: the largest, where several rows hold it."""
    pictures: dict[str, tuple[Pair, float]] = {}
    for pair, weight in (*_weighted(data.images, data.image_weights), *_weighted(data.pairs, data.weights)):
        pictures[pair.key] = (pair, max(weight, pictures[pair.key][1] if pair.key in pictures else 0.0))
    return pictures


def _weighted_texts(data: TrainingData) -> dict[str, float]:
    """Each text once, sorted, with its weight: the largest, where several rows hold it."""
    texts: dict[str, float] = {}
    captions = ((text, weight) for pair, weight in _weighted(data.pairs, data.weights) for text in pair.captions)
    for text, weight in (*_weighted(data.texts, data.text_weights), *captions):
        texts[text] = max(weight, texts.get(text, 0.0))
    return dict(sorted(texts.items()))


def _weighted(rows: Sequence[Row], weights: Sequence[float]) -> Iterator[tuple[Row, float]]:
    return zip(rows, weights or [1.0] * len(rows), strict=True)


def _wanted(name: str, batch: int, rows: int) -> bool:
    if batch and not rows:
        what = {"batch": "pairs", "batch_images": "pictures", "batch_texts": "texts"}[name]
        raise ConfigError(f"train.{name}: {batch} {what} a step are asked for, but the data have none")
    return batch > 0


def _check(data: TrainingData) -> None:
    holed = [pair.key for pair in data.pairs if pair.picture is None or not pair.captions]
    holed += [pair.key for pair in data.images if pair.picture is None]
    if holed:
        raise DataError(
            f"{len(holed)} training rows have no picture or no caption, the first {holed[0]!r}: "
            "give them as data.images or data.texts, or reject them"
        )
    kinds = (
        ("pairs", data.weights, data.pairs),
        ("pictures", data.image_weights, data.images),
        ("texts", data.text_weights, data.texts),
    )
    for what, weights, rows in kinds:
        if weights and (len(weights) != len(rows) or min(weights) <= 0):
            raise DataError(
                f"training data: {len(weights)} weights for {len(rows)} {what}; one above 0 is needed for each"
            )
