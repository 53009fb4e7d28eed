"""Publishing: batches of rows into a database, each whole or not at all, so that a lost connection costs one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from clipdistill.core.progress import progress
from clipdistill.publish.rows import Rows

BATCH = 1000
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a table is made.

    Attributes:
        table: Its name, taken literally.
        dim: The width of the vectors.
        encoder: The fingerprint of the encoder that made them.
        half: Store float16 (pgvector's ``halfvec``) instead of float32.
        index: Whether an approximate index is wanted.
        m: HNSW: the links of a node on each layer.
        ef_construction: HNSW: the candidates that are looked at when a node is linked.
    """

    table: str
    dim: int
    encoder: str
    half: bool = False
    index: bool = True
    m: int = 16
    ef_construction: int = 64


@dataclass(frozen=True, slots=True)
class Found:
    """One row that a database found.

    Attributes:
        key: Its name.
        score: Its inner product with the query (cosine), higher is better.
    """

    key: str
    score: float


@dataclass(frozen=True, slots=True)
class Published:
    """What a publication did.

    Attributes:
        rows: How many rows were given.
        written: How many of them the table did not hold, or held with another vector.
        unchanged: How many it held already, bit for bit.
        total: How many rows the table holds now, those of earlier publications among them.
        index: The approximate index, in words; None where there is none.
        seconds: How long it took.
    """

    rows: int
    written: int
    unchanged: int
    total: int
    index: str | None
    seconds: float


class Target(Protocol):
    """A table of one database, made by one encoder. All that publishing knows of a database."""

    def changed(self, keys: Sequence[str], vectors: Floats) -> Mask:
        """Which rows the table does not hold with these very bits (of the type that it stores): bool [len(keys)]."""
        ...

    def upsert(self, keys: Sequence[str], vectors: Floats) -> None:
        """Insert rows, or replace the vectors of keys that are there; all of them or none, durable on return."""
        ...

    def build_index(self) -> str | None:
        """Build the approximate index where it is wanted and missing; returns it in words, None where there is none."""
        ...

    def count(self) -> int:
        """How many rows the table holds."""
        ...

    def nearest(self, query: Floats, k: int, *, exact: bool = False) -> list[Found]:
        """The k nearest rows, best first, equal scores by key; ``exact`` looks at every row.

        Args:
            query: One unit vector [dim].
            k: How many at most, 1 to 1000.
            exact: Pass the approximate index by.
        """
        ...

    def close(self) -> None:
        """Let go of the database."""
        ...


def publish(rows: Rows, target: Target, *, batch: int = BATCH) -> Published:
    """Bring a table to hold the rows, then index it.

    What it holds already, bit for bit, is not written again: a second start goes on by key.
    Rows of the table whose keys are not among these are left as they are.

    Args:
        rows: What to publish.
        target: A live table.
        batch: How many rows are written at a time, as one transaction.

    Raises:
        ValueError: If batch is below 1.
        ConnectionError: If the database goes away; what was written until then stays.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1: got {batch}")
    begun, written = time.monotonic(), 0
    with progress("publish", len(rows), "rows") as advance:
        for start in range(0, len(rows), batch):
            keys, vectors = rows.part(start, start + batch)
            places = np.flatnonzero(target.changed(keys, vectors))
            if len(places):
                target.upsert([keys[place] for place in places], vectors[places])
            written += len(places)
            advance(len(keys))
    described = target.build_index()
    seconds = time.monotonic() - begun
    return Published(len(rows), written, len(rows) - written, target.count(), described, seconds)


def check_k(k: int) -> None:
    """Refuse a number of hits that no service should be asked for.

    Raises:
        ValueError: If k is not 1 to 1000.
    """
    if not 1 <= k <= 1000:
        raise ValueError(f"k must be 1 to 1000: got {k}")


def by_score(found: Sequence[Found]) -> list[Found]:
    """Best first; equal scores by key."""
    return sorted(found, key=lambda hit: (-hit.score, hit.key))
