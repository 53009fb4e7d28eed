"""LanceDB, embedded in a folder: merge by key, the encoder in the schema's metadata, an index where it pays."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import HnswSq

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.core.locks import locked
from clipdistill.publish.faults import check_made, one_line
from clipdistill.publish.target import Floats, Found, Layout, Mask, by_score, check_k

_ENCODER = b"clipdistill.encoder"
_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_\-.]{0,99}")
_LEAST_INDEXED = 10_000  # below, looking at every row takes a few milliseconds
_VECTOR = "vector"
_ALWAYS = timedelta(0)  # look for other processes' rows at each call


@final
class LanceTable:
    """A table (key, vector) of a LanceDB folder. Make one with :func:`open_lancedb`."""

    __slots__ = ("_folder", "_layout", "_place", "_schema", "_table")

    def __init__(self, table: Any, layout: Layout, folder: Path, schema: pa.Schema) -> None:
        self._table, self._layout, self._folder, self._schema = table, layout, folder, schema
        self._place = str(folder)

    def changed(self, keys: Sequence[str], vectors: Floats) -> Mask:
        """Which rows the table does not hold bit for bit: bool [len(keys)]."""
        named = ", ".join("'" + key.replace("'", "''") + "'" for key in keys)
        with _answers(self._place):
            if not keys or not self._table.count_rows():
                return np.ones(len(keys), np.bool_)
            query = self._table.search().where(f"key IN ({named})").select(["key", _VECTOR]).limit(len(keys))
            found = query.to_arrow()
        rows = _matrix(found[_VECTOR], self._layout.dim)
        held = dict(zip(found["key"].to_pylist(), rows, strict=True))
        return np.array(
            [key not in held or held[key].tobytes() != row.tobytes() for key, row in zip(keys, vectors, strict=True)],
            np.bool_,
        )

    def upsert(self, keys: Sequence[str], vectors: Floats) -> None:
        """Insert or replace rows, as one version of the table."""
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
        columns = [pa.array(keys, pa.string()), pa.FixedSizeListArray.from_arrays(flat, self._layout.dim)]
        rows = pa.Table.from_arrays(columns, schema=self._schema)
        # Two merges at once would each insert a key that neither found: LanceDB has no unique keys.
        with locked(_lock(self._folder, self._layout)), _answers(self._place):
            merge = self._table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows)

    def build_index(self) -> str | None:
        """Build HNSW over scalar-quantised vectors where it is wanted and the table has 10,000 rows or more.

        The vectors themselves stay as they were given. An index that is there is brought up to date.
        """
        if not self._layout.index or self.count() < _LEAST_INDEXED:
            return None
        layout = self._layout
        with _answers(self._place):
            if any(_VECTOR in index.columns for index in self._table.list_indices()):
                self._table.optimize()
                return "the one that was there, brought up to date"
            config = HnswSq(distance_type="dot", m=layout.m, ef_construction=layout.ef_construction)
            self._table.create_index(_VECTOR, config=config)
        return f"HNSW over int8, m {layout.m}, ef_construction {layout.ef_construction}"

    def count(self) -> int:
        """How many rows the table holds."""
        with _answers(self._place):
            return int(self._table.count_rows())

    def nearest(self, query: Floats, k: int, *, exact: bool = False) -> list[Found]:
        """The k nearest rows by inner product, best first."""
        check_k(k)
        with _answers(self._place):
            search = self._table.search(np.ascontiguousarray(query, np.float32)).distance_type("dot").limit(k)
            search = search.bypass_vector_index() if exact else search
            found = search.select(["key", "_distance"]).to_arrow()
        # LanceDB's dot distance is 1 - inner product.
        hits = zip(found["key"].to_pylist(), found["_distance"].to_pylist(), strict=True)
        return by_score([Found(key, 1.0 - distance) for key, distance in hits])

    def close(self) -> None:
        """Nothing is held open between two calls."""


def open_lancedb(url: str, layout: Layout) -> LanceTable:
    """Open a folder, and make its table where there is none.

    Args:
        url: The folder; made where it is missing.
        layout: The table.

    Raises:
        ConfigError: If the folder or the name cannot be.
        MismatchError: If the table was made from something else.
        DataError: If LanceDB cannot read what is there.
        OSError: If the folder cannot be made or written.
    """
    _check(url, layout)
    folder = Path(url.removeprefix("file://"))
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [pa.field("key", pa.string(), nullable=False), pa.field(_VECTOR, pa.list_(pa.float32(), layout.dim))],
        metadata={_ENCODER: layout.encoder.encode()},
    )
    with locked(_lock(folder, layout)), _answers(str(folder)):
        base = lancedb.connect(folder, read_consistency_interval=_ALWAYS)
        if (folder / f"{layout.table}.lance").is_dir():
            table = base.open_table(layout.table)
        else:
            table = base.create_table(layout.table, schema=schema)
        found = table.schema
    _check_schema(layout, found)
    return LanceTable(table, layout, folder, schema)


def _lock(folder: Path, layout: Layout) -> Path:
    return folder / f".{layout.table}.lock"


def _check(url: str, layout: Layout) -> None:
    faults = []
    if not url or "\0" in url or "://" in url.removeprefix("file://"):
        faults.append("--url: LanceDB is written into a folder of this machine: give its path")
    if not _NAME.fullmatch(layout.table):
        faults.append(f"--table: {layout.table!r}: LanceDB takes letters, digits, and _ - . inside, at most 100")
    if faults:
        raise ConfigError(faults)


def _check_schema(layout: Layout, schema: pa.Schema) -> None:
    about = (schema.metadata or {}).get(_ENCODER)
    kind = schema.field(_VECTOR).type if _VECTOR in schema.names else None
    found = {
        "columns": sorted(schema.names),
        "dim": kind.list_size if isinstance(kind, pa.FixedSizeListType) else "none",
        "encoder": about.decode("utf-8", "replace") if about else "none",
    }
    expected = {"columns": ["key", _VECTOR], "dim": layout.dim, "encoder": layout.encoder}
    check_made(f"table {layout.table!r}", expected, found)


def _matrix(column: pa.ChunkedArray, dim: int) -> Floats:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(-1, dim)


@contextmanager
def _answers(place: str) -> Iterator[None]:
    """Turn LanceDB's errors, which are built-in ones of Rust's messages, into the package's."""
    try:
        yield
    except (RuntimeError, ValueError) as fault:
        raise DataError(f"{place}: LanceDB: {one_line(fault)}") from fault
