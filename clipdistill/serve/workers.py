"""Threads for what would hold up the event loop, and a bound on how much of it waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar, final

from clipdistill.serve.problems import BusyError

R = TypeVar("R")
Done = Callable[[Any, BaseException | None], None]


@final
class Workers:
    """A few threads that call functions for an event loop. Use them as a context: leaving it finishes what waits.

    ``run_in_executor`` does the same, but hands over through two kinds of futures and their locks; of a search that
    takes a millisecond that was a tenth.

    Args:
        threads: How many.
        name: What they are called in a list of threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._count, self._name = threads, name
        self._threads: list[Thread] = []
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Done, asyncio.AbstractEventLoop] | None] = SimpleQueue()

    def __enter__(self) -> Workers:
        self._threads = [Thread(target=self._work, name=self._name, daemon=True) for _ in range(self._count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for _thread in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def call(self, work: Callable[[], Any], done: Done) -> None:
        """Call a function in the next free thread.

        Args:
            work: The function.
            done: Told its result and None, or None and its fault, by the event loop that this is called in.
        """
        self._jobs.put((work, done, asyncio.get_running_loop()))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, done, loop = job
            result, fault = None, None
            try:
                result = work()
            except BaseException as error:  # of any kind: it belongs to whoever asked, and this thread must go on
                fault = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(done, result, fault)
            del job, work, done, loop, result, fault  # while it waits, it keeps nobody's query


@final
class Gate:
    """Threads that many requests share, and a bound on how many of them wait. Use it as a context.

    Args:
        threads: How many run at once.
        waiting: How many may be inside, running or waiting, before :meth:`admit` refuses.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self._workers = Workers(threads, "clipdistill-serve")
        self._most, self._inside = waiting, 0

    def __enter__(self) -> Gate:
        self._workers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.__exit__()

    def admit(self) -> None:
        """Let a request in or refuse it: at its arrival, not when half of its work is done.

        Raises:
            BusyError: If too many wait already.
        """
        if self._inside >= self._most:
            raise BusyError(1)

    async def run(self, call: Callable[..., R], *args: object) -> R:
        """Call a function in a thread, as soon as one is free; not at all where its client has given up by then."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()

        def work() -> R | None:
            return None if future.cancelled() else call(*args)

        def done(result: Any, fault: BaseException | None) -> None:
            if not future.done():
                settle(future, result, fault)

        self._inside += 1
        try:
            self._workers.call(work, done)
            return await future
        finally:
            self._inside -= 1


def settle(future: asyncio.Future[R], result: R, fault: BaseException | None) -> None:
    """Give a future its fault where there is one, else its result."""
    if fault is None:
        future.set_result(result)
    else:
        future.set_exception(fault)
