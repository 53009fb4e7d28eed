"""Which rows a step trains on: a pure function of (seed, step), so that a run resumes anywhere, with any workers.

No state and no library's shuffle: an epoch's order is the order of raw Philox words, which no numpy version may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of a batch.

    Attributes:
        row: Its number in the data.
        turn: Rises from one drawing of the row to the next, within an epoch and over the epochs.
    """

    row: int
    turn: int


@final
class Stream:
    """An endless sequence of rows, shuffled epoch by epoch and cut into batches of one size.

    An epoch is as many draws as there are rows. With equal weights each row comes exactly once; otherwise each comes
    ``weight / mean weight`` times, rounded up or down by systematic sampling over a fresh order (Madow 1949), so that
    no epoch is further than one draw from a row's share. The last, short batch of an epoch is filled up from the
    beginning of the next one, so every batch is full; a batch across that border may hold a row twice.

    Args:
        name: Streams of other names are independent of this one.
        rows: How many rows there are, at least 1.
        batch: Draws a step.
        seed: The run's seed.
        weights: How often each row is drawn against the others, above 0; none = equally often.
    """

    def __init__(self, name: str, rows: int, batch: int, seed: int, weights: Sequence[float] = ()) -> None:
        self.name, self.rows, self.batch, self.seed = name, rows, batch, seed
        shares = np.asarray(weights, np.float64)
        self._shares = None if len(set(weights)) <= 1 else shares * (rows / shares.sum())
        self._orders: dict[int, tuple[Rows, Rows]] = {}

    def draw(self, step: int) -> list[Draw]:
        """The rows of one step, counted from 0."""
        draws: list[Draw] = []
        position, end = step * self.batch, (step + 1) * self.batch
        while position < end:
            epoch, first = divmod(position, self.rows)
            last = min(self.rows, first + end - position)
            rows, turns = self._order(epoch)
            draws += map(Draw, rows[first:last].tolist(), turns[first:last].tolist())
            position += last - first
        return draws

    def epoch(self, steps: int) -> float:
        """How many epochs have been drawn after so many steps."""
        return steps * self.batch / self.rows

    def _order(self, epoch: int) -> tuple[Rows, Rows]:
        """Rows and turns of one epoch; only the latest two are kept, as a batch may lie across their border."""
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = self._shuffled(epoch)
        return self._orders[epoch]

    def _shuffled(self, epoch: int) -> tuple[Rows, Rows]:
        order = self._permutation(epoch, "order")
        if self._shares is None:
            return order, np.broadcast_to(np.int64(epoch), order.shape)
        # One more order for the systematic pass: over the data's own, neighbours would always be drawn by turns.
        lined_up = self._permutation(epoch, "systematic")
        start = int(_words(1, self.seed, self.name, epoch, "start")[0]) * 2.0**-64
        marks = np.cumsum(self._shares[lined_up])
        found = np.searchsorted(marks, np.arange(self.rows) + start, side="right").clip(max=self.rows - 1)
        rows = lined_up[found]
        copies = np.arange(self.rows) - np.searchsorted(found, found, side="left")
        turns = epoch * np.ceil(self._shares[rows]).astype(np.int64) + copies
        return rows[order], turns[order]

    def _permutation(self, epoch: int, purpose: str) -> Rows:
        return permutation(self.rows, self.seed, self.name, epoch, purpose)


def choose(count: int, turn: int, *names: object) -> int:
    """One of ``count`` things, each in its turn, from a start that depends on the names alone.

    Args:
        count: How many there are to choose from, at least 1.
        turn: Which drawing it is.
        names: Seed, purpose and key.
    """
    return 0 if count == 1 else (_number(*names) + turn) % count


def permutation(count: int, *names: object) -> Rows:
    """An order of ``count`` things that depends on the names alone: [count] numbers from 0.

    Args:
        count: How many there are.
        names: Seed, purpose, step and key.
    """
    return np.argsort(_words(count, *names), kind="stable").astype(np.int64, copy=False)


def seed_of(*names: object) -> int:
    """A seed in [0, 2^63) for a library's generator, from the run's seed, the purpose and the step."""
    return _number(*names) >> 1


def _words(count: int, *names: object) -> npt.NDArray[np.uint64]:
    key = np.frombuffer(_digest(*names)[:16], "<u8").astype(np.uint64)
    return np.asarray(np.random.Philox(key=key).random_raw(count), np.uint64)


def _number(*names: object) -> int:
    return int.from_bytes(_digest(*names)[:8], "little")


def _digest(*names: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, names)).encode("utf-8", "surrogatepass")).digest()
