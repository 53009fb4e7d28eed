"""One model at work: its encoder behind two batchers, its index behind a gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, final

from clipdistill.data.pictures import check_header
from clipdistill.data.records import Picture
from clipdistill.retrieval.exact import Vectors
from clipdistill.search import Hit, Searcher
from clipdistill.serve.batching import Batcher
from clipdistill.serve.metrics import Metrics
from clipdistill.serve.options import Options
from clipdistill.serve.workers import Gate

T = TypeVar("T")
_QUICK_S = 0.003


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model found.

    Attributes:
        hits: Best first.
        encode_ms: Milliseconds until the search began: embedding the query, and the waits.
        search_ms: Milliseconds of the search.
    """

    hits: list[Hit]
    encode_ms: float
    search_ms: float


@final
class Engine:
    """A searcher that many requests share. Use it as an asynchronous context.

    Args:
        name: What the model is called in requests and answers.
        searcher: The encoder and its index.
        options: The service's bounds.
        metrics: Told what is encoded.
        gate: The threads for searching and for reading pictures' headers.
        series: What the metrics call it; the name where None.
    """

    def __init__(
        self,
        name: str,
        searcher: Searcher,
        options: Options,
        metrics: Metrics,
        gate: Gate,
        *,
        series: str | None = None,
    ) -> None:
        self.name, self.searcher, self._series = name, searcher, series or name
        self._pixels, self._gate = options.pixels, gate
        self._search_s = float("inf")
        self._texts: Batcher[str] = self._batcher(searcher.encoder.encode_texts, "text", options, metrics)
        self._pictures: Batcher[Picture] = self._batcher(searcher.encoder.encode_images, "image", options, metrics)
        metrics.indexed(self._series, len(searcher.index))

    def _batcher(
        self, encode: Callable[[Sequence[T]], Vectors], tower: str, options: Options, metrics: Metrics
    ) -> Batcher[T]:
        return Batcher(
            encode,
            batch=options.batch,
            window_s=options.window_ms / 1000,
            waiting=options.waiting,
            encoded=partial(metrics.encoded, self._series, tower),
            queued=partial(metrics.waiting, self._series, tower),
        )

    async def __aenter__(self) -> Engine:
        self._stack = AsyncExitStack()
        await self._stack.enter_async_context(self._texts)
        await self._stack.enter_async_context(self._pictures)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Embed texts: float32 [len(texts), dim], unit rows.

        Raises:
            BusyError: If too many wait.
        """
        return await self._texts.encode(texts)

    async def embed_pictures(self, pictures: Sequence[Picture]) -> Vectors:
        """Embed pictures: float32 [len(pictures), dim], unit rows.

        Raises:
            BusyError: If too many wait.
            DataError: If one is no picture, is broken, or has too many pixels; seen from the headers before anything
                is decoded.
        """
        self._gate.admit()
        await self._gate.run(_check_headers, pictures, self._pixels)
        return await self._pictures.encode(pictures)

    async def search(self, query: str | Picture, k: int) -> Answer:
        """Search by a text or by a picture.

        Raises:
            BusyError: If too many wait.
            DataError: If the picture cannot be used.
        """
        self._gate.admit()
        started, find = time.perf_counter(), partial(self._find, k)
        found = None
        if not isinstance(query, str):
            rows = await self.embed_pictures([query])
        elif self._search_s < _QUICK_S:
            rows, found = await self._texts.encode_then([query], find)
        else:
            rows = await self.embed_texts([query])
        if found is None:
            found = await self._gate.run(find, rows)
        hits, begun, ended = found
        self._search_s = ended - begun
        return Answer(hits, 1000 * (begun - started), 1000 * (ended - begun))

    def _find(self, k: int, rows: Vectors) -> tuple[list[Hit], float, float]:
        """In a thread: the hits, and when they were looked for, from and to."""
        begun = time.perf_counter()
        hits = self.searcher.by_vector(rows[0], k)
        return hits, begun, time.perf_counter()


def _check_headers(pictures: Sequence[Picture], pixels: int) -> None:
    for picture in pictures:
        check_header(picture, pixels)
