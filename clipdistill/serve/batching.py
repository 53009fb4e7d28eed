"""Bounded work: requests that arrive together are encoded together, and what would wait too long is refused."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar, final

import numpy as np

from clipdistill.retrieval.exact import Vectors
from clipdistill.serve.problems import BusyError

T = TypeVar("T")
R = TypeVar("R")
_LONGEST_WAIT_S = 60
_MEMORY = 0.8  # of the running mean of seconds an item


@dataclass(slots=True)
class _Request(Generic[T]):
    items: Sequence[T]
    done: asyncio.Future[Vectors]


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
        self._queue: deque[_Request[T]] = deque()
        self._count = 0
        self._item_s = 0.0
        self._crowded = self._closing = False

    async def __aenter__(self) -> Batcher[T]:
        self._arrived = asyncio.Event()
        self._closing = False
        self._pool = ThreadPoolExecutor(1, "clipdistill-encode")
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._arrived.set()
        await self._worker
        self._pool.shutdown()

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
        if self._count + len(items) > self._most:
            raise BusyError(min(_LONGEST_WAIT_S, max(1, math.ceil(self._count * self._item_s))))
        request = _Request(items, asyncio.get_running_loop().create_future())
        self._queue.append(request)
        self._note(len(items))
        self._arrived.set()
        return await request.done

    def _note(self, change: int) -> None:
        self._count += change
        self._queued(self._count)

    async def _work(self) -> None:
        while True:
            while not self._queue:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            if self._crowded and not self._closing:
                await self._wait_for_company()
            await self._run(self._take())

    async def _wait_for_company(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._window_s):
                while self._count < self._batch and not self._closing:
                    self._arrived.clear()
                    await self._arrived.wait()

    def _take(self) -> list[_Request[T]]:
        """The requests of the next batch, in order of arrival; those whose client gave up are dropped."""
        taken: list[_Request[T]] = []
        size = 0
        while self._queue and (not taken or size + len(self._queue[0].items) <= self._batch):
            request = self._queue.popleft()
            self._note(-len(request.items))
            if not request.done.done():
                taken.append(request)
                size += len(request.items)
        return taken

    async def _run(self, requests: Sequence[_Request[T]]) -> None:
        if not requests:
            return
        self._crowded = len(requests) > 1
        items = [item for request in requests for item in request.items]
        started = time.perf_counter()
        try:
            rows = await asyncio.get_running_loop().run_in_executor(self._pool, self._rows, items)
        except Exception as fault:  # of any kind: it belongs to whoever asked, and the next batch must still run
            await self._fail(requests, fault)
            return
        seconds = time.perf_counter() - started
        self._item_s = _MEMORY * self._item_s + (1 - _MEMORY) * seconds / len(items)
        self._encoded(len(items), seconds)
        ends = np.cumsum([len(request.items) for request in requests])
        for request, part in zip(requests, np.split(rows, ends[:-1]), strict=True):
            if not request.done.done():
                request.done.set_result(part)

    def _rows(self, items: Sequence[T]) -> Vectors:
        rows = self._encode(items)
        if len(rows) != len(items):
            raise RuntimeError(f"the encoder made {len(rows)} rows of {len(items)} items")
        return rows

    async def _fail(self, requests: Sequence[_Request[T]], fault: Exception) -> None:
        """Give a lone request its fault; run the requests of a failed batch each alone, as the fault is one's only."""
        if len(requests) > 1:
            for request in requests:
                await self._run([request])
        elif not requests[0].done.done():
            requests[0].done.set_exception(fault)


@final
class Gate:
    """A few threads for work that would hold up the event loop, and a bound on how much of it waits.

    Args:
        threads: How many run at once.
        waiting: How many may be inside, running or waiting, before :meth:`admit` refuses.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "clipdistill-serve")
        self._most, self._inside = waiting, 0

    def admit(self) -> None:
        """Let a request in or refuse it: at its arrival, not when half of its work is done.

        Raises:
            BusyError: If too many wait already.
        """
        if self._inside >= self._most:
            raise BusyError(1)

    async def run(self, call: Callable[..., R], *args: object) -> R:
        """Call a function in a thread, as soon as one is free."""
        self._inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args))
        finally:
            self._inside -= 1

    def close(self) -> None:
        """Finish what runs, and end the threads."""
        self._pool.shutdown()
