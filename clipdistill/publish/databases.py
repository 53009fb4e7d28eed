"""The databases by name, and the door that resolves names, paths and URLs to live objects."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from clipdistill.core.errors import ConfigError, MissingExtraError, suggest
from clipdistill.publish.rows import Rows
from clipdistill.publish.target import BATCH, Layout, Published, Target, publish

DATABASES: Final = {"pgvector": "psycopg", "lancedb": "lancedb", "qdrant": "qdrant-client"}
"""The databases, each with the package that reaches it."""
_HALF = ("pgvector",)
_LINKS, _MOST_EFFORT = (2, 100), 1000  # pgvector's limits of HNSW; the others' are wider


def open_target(database: str, url: str, layout: Layout) -> Target:
    """A live table of a database, made where there is none.

    Args:
        database: ``pgvector``, ``lancedb`` or ``qdrant``.
        url: The database: what each takes is said at its own ``open_`` function.
        layout: The table.

    Raises:
        ConfigError: If the database is unknown, or the layout is not for it.
        MissingExtraError: If its client is not installed.
        ConnectionError: If it cannot be reached.
        MismatchError: If the table was made from something else.
        DataError: If the database refuses.
    """
    if database not in DATABASES:
        raise ConfigError(f"--to: unknown database {database!r}; {suggest(database, DATABASES)}")
    if layout.half and database not in _HALF:
        raise ConfigError(f"--halfvec: {database} has no halfvec; only {', '.join(_HALF)} does. Leave it out")
    if not (_LINKS[0] <= layout.m <= _LINKS[1] and 2 * layout.m <= layout.ef_construction <= _MOST_EFFORT):
        raise ConfigError(
            f"--m {layout.m}, --ef-construction {layout.ef_construction}: m is {_LINKS[0]} to {_LINKS[1]}, and "
            f"ef_construction 2 m to {_MOST_EFFORT}"
        )
    try:
        if database == "pgvector":
            from clipdistill.publish.pgvector import open_pgvector

            return open_pgvector(url, layout)
        if database == "lancedb":
            from clipdistill.publish.lancedb import open_lancedb

            return open_lancedb(url, layout)
        from clipdistill.publish.qdrant import open_qdrant

        return open_qdrant(url, layout)
    except ImportError as fault:
        missing = (fault.name or DATABASES[database]).split(".")[0]
        raise MissingExtraError(missing.replace("_", "-"), "publish") from fault


def read_rows(source: Path, ids: Path | None = None, encoder: str | None = None) -> Rows:
    """The rows of a saved index, or of a ``.npy`` file with ids and the encoder's fingerprint.

    Raises:
        ConfigError: If what is given does not go together.
        DataError: If they cannot be read, or the index keeps its vectors compressed.
    """
    if source.suffix != ".npy":
        if ids is not None or encoder is not None:
            raise ConfigError("--ids and --encoder go with a .npy file: an index carries its own")
        return Rows.of_index(source)
    if ids is None or encoder is None:
        raise ConfigError("a .npy file needs --ids FILE (one key a line) and --encoder FINGERPRINT")
    return Rows.of_files(source, ids, encoder)


def publish_to(rows: Rows, database: str, url: str, layout: Layout, batch: int = BATCH) -> Published:
    """Open a table, publish into it, and let go of it.

    Raises:
        ConfigError: If batch is below 1, or as :func:`open_target`.
    """
    if batch < 1:
        raise ConfigError(f"--batch: {batch}: at least 1 is needed")
    target = open_target(database, url, layout)
    try:
        return publish(rows, target, batch=batch)
    finally:
        target.close()
