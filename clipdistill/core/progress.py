"""Progress of long work: a bar on a terminal, plain lines with a rate and an estimate in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_log = logging.getLogger("clipdistill")
_SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """What :func:`progress` hands out: call it with the number of items that were just done."""

    def __call__(self, count: int) -> None:
        """Report ``count`` more items as done."""
        ...


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Report the progress of a block of work.

    Args:
        label: What is done, in a word or two.
        total: How many items there are.
        unit: What the items are, for the rate: ``pictures``.

    Yields:
        A function to call with the number of items that were just done.
    """
    if sys.stderr.isatty():
        yield from _bar(label, total, unit)
    else:
        yield from _lines(label, total, unit)


def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def _lines(label: str, total: int, unit: str) -> Iterator[Advance]:
    begun = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            rate = done / (now - begun)
            left = (total - done) / rate if rate else float("inf")
            _log.info("%s: %d of %d %s, %.1f a second, %s left", label, done, total, unit, rate, duration(left))

    yield advance


def duration(seconds: float) -> str:
    """A duration in words that suit its size: ``42 s``, ``3 min 10 s``, ``5 h 02 min``."""
    if seconds == float("inf"):
        return "an unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
