"""Bounded work: requests that arrive together are encoded together, and what would wait too long is refused."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, final

from clipdistill.retrieval.exact import Vectors
from clipdistill.serve.problems import BusyError
from clipdistill.serve.workers import Workers, settle

T = TypeVar("T")
R = TypeVar("R")
_LONGEST_WAIT_S = 60
_MEMORY = 0.8  # of the running mean of seconds an item


@dataclass(slots=True, eq=False)
class _Request(Generic[T]):
    items: Sequence[T]
    then: Callable[[Vectors], Any] | None
    done: asyncio.Future[tuple[Vectors, Any]]


@final
class Batcher(Generic[T]):
    """Dynamic micro-batching in front of one tower of an encoder, which runs in a thread of its own.

    A request that comes alone is encoded at once. While the tower is busy, requests gather; after a batch of more than
    one, the next waits up to the window for company, since it is likely to come. A request is never split.

    Use it as an asynchronous context: leaving it finishes what waits.

    Args:
        encode: Items in, one unit row for each out.
        batch: How many items make a full batch; a request of more is a batch of its own.
        window_s: How long to wait for company, in seconds.
        waiting: How many items may wait.
        encoded: Told the items and seconds of each batch.
        queued: Told how many items wait, whenever that changes.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[T]], Vectors],
        *,
        batch: int,
        window_s: float,
        waiting: int,
        encoded: Callable[[int, float], None],
        queued: Callable[[int], None],
    ) -> None:
        self._encode, self._batch, self._window_s, self._most = encode, batch, window_s, waiting
        self._encoded, self._queued = encoded, queued
        self._worker = Workers(1, "clipdistill-encode")
        self._queue: deque[_Request[T]] = deque()
        self._again: deque[_Request[T]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0
        self._item_s = 0.0
        self._busy = self._crowded = self._closing = False

    async def __aenter__(self) -> Batcher[T]:
        self._worker.__enter__()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._look()
        await self._idle.wait()
        self._worker.__exit__()

    async def encode(self, items: Sequence[T]) -> Vectors:
        """Encode items together with those of other requests.

        Args:
            items: At least one.

        Returns:
            float32 [len(items), dim].

        Raises:
            BusyError: If too many wait already.
            DataError: If an item cannot be encoded; other requests do not notice.
        """
        return (await self._ask(items, None))[0]

    async def encode_then(self, items: Sequence[T], then: Callable[[Vectors], R]) -> tuple[Vectors, R | None]:
        """Encode items, and where nobody else does, do with their rows in the same thread what is to be done next.

        That saves a lone request a second hand-over between threads; in a crowd the encoder goes on to the next batch.

        Args:
            items: At least one.
            then: Given the rows; must be quick, and not return None.

        Returns:
            The rows, and what ``then`` made of them; None: it was not called.

        Raises:
            BusyError: If too many wait already.
            DataError: If an item cannot be encoded; other requests do not notice.
        """
        return await self._ask(items, then)

    async def _ask(self, items: Sequence[T], then: Callable[[Vectors], Any] | None) -> tuple[Vectors, Any]:
        if self._count + len(items) > self._most:
            raise BusyError(min(_LONGEST_WAIT_S, max(1, math.ceil(self._count * self._item_s))))
        request = _Request(items, then, asyncio.get_running_loop().create_future())
        self._queue.append(request)
        self._idle.clear()
        self._note(len(items))
        self._look()
        return await request.done

    def _note(self, change: int) -> None:
        self._count += change
        self._queued(self._count)

    def _look(self) -> None:
        """Start the next batch, unless one runs; after a crowd, when the batch is full or the window has passed."""
        if self._busy:
            return
        if not self._crowded or self._closing or self._again or not 0 < self._count < self._batch:
            self._start()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._window_s, self._start)

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        requests = self._take()
        if not requests:
            self._idle.set()
            return
        self._busy, self._crowded = True, len(requests) > 1
        self._worker.call(partial(self._rows, requests), partial(self._ended, requests))

    def _take(self) -> list[_Request[T]]:
        """The requests of the next batch, in order of arrival; those whose client gave up are dropped."""
        taken: list[_Request[T]] = []
        while self._again and not taken:
            request = self._again.popleft()
            if not request.done.done():
                return [request]
        size = 0
        while self._queue and (not taken or size + len(self._queue[0].items) <= self._batch):
            request = self._queue.popleft()
            self._note(-len(request.items))
            if not request.done.done():
                taken.append(request)
                size += len(request.items)
        return taken

    def _rows(self, requests: Sequence[_Request[T]]) -> tuple[Vectors, float, Any]:
        """In the encoder's thread: the rows of all requests, the seconds that they took, and what a lone one wants."""
        items = [item for request in requests for item in request.items]
        started = time.perf_counter()
        rows = self._encode(items)
        seconds = time.perf_counter() - started
        if len(rows) != len(items):
            raise RuntimeError(f"the encoder made {len(rows)} rows of {len(items)} items")
        then = requests[0].then if len(requests) == 1 else None
        return rows, seconds, None if then is None else then(rows)

    def _ended(self, requests: Sequence[_Request[T]], made: Any, fault: BaseException | None) -> None:
        """Give each request its rows. Of a batch that failed, each is tried again alone: the fault is one's only."""
        self._busy = False
        if fault is None:
            self._give(requests, *made)
        elif len(requests) > 1:
            self._again.extend(requests)
        elif not requests[0].done.done():
            settle(requests[0].done, made, fault)
        self._look()

    def _give(self, requests: Sequence[_Request[T]], rows: Vectors, seconds: float, found: Any) -> None:
        self._item_s = _MEMORY * self._item_s + (1 - _MEMORY) * seconds / len(rows)
        self._encoded(len(rows), seconds)
        start = 0
        for request in requests:
            end = start + len(request.items)
            if not request.done.done():
                request.done.set_result((rows[start:end], found))
            start = end
