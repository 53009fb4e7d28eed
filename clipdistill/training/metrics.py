"""The numbers of a run: ``metrics.jsonl``, one object a line, and the same scalars as TensorBoard events.

==========  =========================================================================================================
training    ``step, epoch, loss``, every term by its name (at a narrower width ``NAME@WIDTH``, and the learned
            ``log_variance_WEIGHT`` of balanced losses), ``lr, lr_image, lr_text, grad_norm, rejected, samples_per_s,
            data_seconds, compute_seconds``: the step's own values; ``rejected`` counts the unreadable pictures so far;
            the times and the rate are over the steps since the line before
evaluation  ``step, score`` and what else the evaluation gave
skipped     ``step, skipped, skipped_loss, skipped_grad_norm, keys``: a step whose loss or gradient was not finite;
            ``skipped`` counts them so far
==========  =========================================================================================================

``step`` counts the steps done. A number that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from clipdistill.core import files

FILE = "metrics.jsonl"
EVENTS = "tensorboard"
Line = Mapping[str, Any]


@final
class Metrics:
    """Writes the numbers of a run, so that a resumed run's file reads like an uninterrupted one's.

    Args:
        folder: The run's folder; None writes nothing.
        step: The step that the run goes on from: later lines of the file are cut off.
        on_log: Called with every line.
    """

    def __init__(self, folder: Path | None, step: int, on_log: Callable[[Line], None] | None = None) -> None:
        self._on_log = on_log
        self._file = self._events = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _cut(folder / FILE, step)
            self._file = (folder / FILE).open("a", encoding="utf-8")
            self._events = _event_writer(folder / EVENTS, step)

    def write(self, line: Line) -> None:
        """Write one line, to the file at once."""
        line = {name: _plain(value) for name, value in line.items()}
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in _scalars(line):
                self._events.add_scalar(name, value, line["step"])
        if self._on_log is not None:
            self._on_log(line)

    def sync(self) -> None:
        """Make what was written durable: called before a checkpoint, which promises the lines before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


@final
class Clock:
    """Where the time went since it was last read."""

    def __init__(self) -> None:
        self._samples, self._seconds = 0, {"data": 0.0, "compute": 0.0}

    def timed(self, items: Iterator[Any]) -> Iterator[Any]:
        """The same items; the time that each takes to come counts as data."""
        while True:
            with self.measure("data"):
                item = next(items, None)
            if item is None:
                return
            yield item

    @contextmanager
    def measure(self, what: str, samples: int = 0) -> Iterator[None]:
        """Count the block's seconds as ``data`` or ``compute``, and its samples."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - begun
            self._samples += samples

    def read(self) -> dict[str, float]:
        """The rate and the seconds since the last reading."""
        data, compute = self._seconds["data"], self._seconds["compute"]
        rate = self._samples / max(1e-9, data + compute)
        self._samples, self._seconds = 0, {"data": 0.0, "compute": 0.0}
        return {"samples_per_s": rate, "data_seconds": data, "compute_seconds": compute}


def _cut(path: Path, step: int) -> None:
    """Keep the whole lines up to a step; a kill may have left half a line at the end."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    files.write_text(path, "".join(kept))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | list) else _plain(float(value))


def _scalars(line: Line) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in line.items() if isinstance(value, int | float) and name != "step")


def _event_writer(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # loads tensorboard, which takes a second

    _wait_for_its_own_second(folder)
    return SummaryWriter(str(folder), purge_step=step + 1)


def _wait_for_its_own_second(folder: Path) -> None:
    """TensorBoard reads files by their names, which begin with the second: of two of one second, in any order."""
    taken = {path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*")}
    while f"{int(time.time()):010d}" in taken:
        time.sleep(0.05)
