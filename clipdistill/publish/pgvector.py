"""PostgreSQL with pgvector: binary COPY into a temporary table, upsert by key, one transaction a batch, HNSW after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import psycopg
from pgvector import HalfVector, Vector
from psycopg import conninfo, sql

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.publish.faults import check_made, lost, one_line
from clipdistill.publish.target import Floats, Found, Layout, Mask, by_score, check_k

_MAKER = "clipdistill publish"
_LONGEST_NAME = 63  # bytes; PostgreSQL cuts longer identifiers, so two tables would become one
_LONGEST_KEY = 2600  # bytes; a row of a B-tree has 2704
_WIDEST_INDEXED = {"vector": 2000, "halfvec": 4000}
_LEAST_SEARCHED, _MOST_SEARCHED = 40, 1000  # hnsw.ef_search: pgvector's default and limit
_CONNECT_SECONDS = "10"
_INCOMING = sql.Identifier("pg_temp", "clipdistill_incoming")

_CREATE = "CREATE TABLE {table} (key text PRIMARY KEY, embedding {type} NOT NULL)"
_COLUMNS = """
    SELECT a.attname, t.typname, a.atttypmod FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
"""
_INDEXES = """
    SELECT c.relname, c.reloptions FROM pg_index x
    JOIN pg_class c ON c.oid = x.indexrelid JOIN pg_am m ON m.oid = c.relam JOIN pg_opclass o ON o.oid = x.indclass[0]
    WHERE x.indrelid = to_regclass(%s) AND m.amname = 'hnsw' AND o.opcname = %s AND x.indisvalid
"""
_UPSERT = """
    INSERT INTO {table} (key, embedding) SELECT key, embedding FROM {incoming} ORDER BY key
    ON CONFLICT (key) DO UPDATE SET embedding = excluded.embedding
"""
# <#> is the negative inner product: the smallest is the nearest.
_NEAREST = """
    SELECT key, -(embedding <#> %(query)s::{type}) FROM {table} ORDER BY embedding <#> %(query)s::{type} LIMIT %(k)s
"""


@final
class PgTable:
    """A table (key text primary key, embedding vector or halfvec) whose comment names the encoder.

    Make one with :func:`open_pgvector`.
    """

    __slots__ = ("_connection", "_layout", "_place", "_schema")

    def __init__(self, connection: psycopg.Connection[Any], layout: Layout, place: str) -> None:
        self._connection, self._layout, self._place = connection, layout, place
        with self._answers():
            self._schema = connection.execute("SELECT current_schema()").fetchone()[0]  # type: ignore[index]
        if self._schema is None:
            raise DataError(f"{place}: no schema to make a table in. Name one: ?options=-csearch_path%3DSCHEMA")

    def prepare(self) -> None:
        """Make the table where there is none, and hold an existing one against the layout.

        Raises:
            MismatchError: If another program, another encoder or another width made it, or its index differs.
            DataError: If the server has no pgvector, or refuses.
        """
        with self._answers(), self._alone():
            self._require_extension()
            columns = {row[0]: row[1:] for row in self._connection.execute(_COLUMNS, [self._name()])}
            if not columns:
                self._create()
                return
            comment = self._connection.execute(
                "SELECT obj_description(to_regclass(%s), 'pg_class')", [self._name()]
            ).fetchone()
        made = _read_comment(comment[0] if comment else None)
        kind, width = columns.get("embedding", ("none", "none"))
        expected = {"made by": _MAKER, "dim": self._layout.dim, "encoder": self._layout.encoder, "type": self._kind}
        check_made(f"table {self._layout.table!r}", expected, {**made, "dim": width, "type": kind})
        if self._layout.index:
            self._index()

    def changed(self, keys: Sequence[str], vectors: Floats) -> Mask:
        """Which rows the table does not hold bit for bit, compared by their SHA-256: bool [len(keys)]."""
        query = self._sql("SELECT key, sha256({send}(embedding)) FROM {table} WHERE key = ANY(%s)", values=True)
        with self._answers():
            held = {key: bytes(digest) for key, digest in self._connection.execute(query, [list(keys)])}
        digests = [hashlib.sha256(self._binary(row)).digest() for row in vectors]
        return np.array([held.get(key) != digest for key, digest in zip(keys, digests, strict=True)], np.bool_)

    def upsert(self, keys: Sequence[str], vectors: Floats) -> None:
        """Insert or replace rows in one transaction.

        Raises:
            DataError: If a key is longer than a B-tree holds, or the server refuses.
            ConnectionError: If the connection is lost; nothing of this call is in the table then.
        """
        for key in keys:
            if len(key.encode("utf-8")) > _LONGEST_KEY:
                raise DataError(
                    f"the key {key[:40]!r}... is longer than the {_LONGEST_KEY} bytes that PostgreSQL indexes"
                )
        incoming = self._sql("CREATE TEMPORARY TABLE {incoming} (key text, embedding {type}) ON COMMIT DROP")
        copy_in = self._sql("COPY {incoming} (key, embedding) FROM STDIN (FORMAT BINARY)")
        with self._answers(), self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.execute(incoming)
            with cursor.copy(copy_in) as copy:
                copy.set_types(
                    ["text", "bytea"]
                )  # binary COPY carries no types: the column's own reader takes the bytes
                for key, row in zip(keys, vectors, strict=True):
                    copy.write_row((key, self._binary(row)))
            cursor.execute(self._sql(_UPSERT))

    def build_index(self) -> str | None:
        """Build the HNSW index by inner product where it is wanted and missing.

        After loading, because a graph that is built at once is faster to build and better linked. The server builds it
        in ``maintenance_work_mem``, which the URL can raise: ``?options=-cmaintenance_work_mem%3D1GB``.
        """
        if not self._layout.index:
            return None
        create = self._sql(
            "CREATE INDEX ON {table} USING hnsw (embedding {ops}) WITH (m = {m}, ef_construction = {ef})"
        )
        with self._answers(), self._alone():
            if not self._index():
                self._connection.execute(create)
        return f"HNSW, m {self._layout.m}, ef_construction {self._layout.ef_construction}"

    def count(self) -> int:
        """How many rows the table holds."""
        with self._answers():
            row = self._connection.execute(self._sql("SELECT count(*) FROM {table}")).fetchone()
        return int(row[0]) if row else 0

    def nearest(self, query: Floats, k: int, *, exact: bool = False) -> list[Found]:
        """The k nearest rows by inner product, best first; the query is rounded where the table holds float16."""
        check_k(k)
        searched = str(min(_MOST_SEARCHED, max(_LEAST_SEARCHED, 2 * k)))
        values = {"query": Vector(np.ascontiguousarray(query, np.float32)).to_text(), "k": k}
        with self._answers(), self._connection.transaction():
            self._connection.execute("SELECT set_config('hnsw.ef_search', %s, true)", [searched])
            if exact:
                self._connection.execute("SET LOCAL enable_indexscan = off")
            found = self._connection.execute(self._sql(_NEAREST, values=True), values).fetchall()
        return by_score([Found(key, float(score)) for key, score in found])

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @property
    def _kind(self) -> str:
        return "halfvec" if self._layout.half else "vector"

    def _binary(self, row: Floats) -> bytes:
        return HalfVector(row).to_binary() if self._layout.half else Vector(row).to_binary()

    def _name(self) -> str:
        return sql.Identifier(self._schema, self._layout.table).as_string(self._connection)

    def _sql(self, text: str, *, values: bool = False) -> sql.Composed:
        """A statement with its names filled in, each quoted by psycopg; ``values``: it is executed with some."""
        names = (self._schema, self._layout.table)
        if values:  # psycopg looks for placeholders inside names too
            names = (names[0].replace("%", "%%"), names[1].replace("%", "%%"))
        return sql.SQL(text).format(
            table=sql.Identifier(*names),
            incoming=_INCOMING,
            type=sql.SQL("{}({})").format(sql.SQL(self._kind), sql.Literal(self._layout.dim)),
            send=sql.Identifier(f"{self._kind}_send"),
            ops=sql.Identifier(f"{self._kind}_ip_ops"),
            m=sql.Literal(self._layout.m),
            ef=sql.Literal(self._layout.ef_construction),
            about=sql.Literal(json.dumps({"made by": _MAKER, "encoder": self._layout.encoder})),
        )

    def _require_extension(self) -> None:
        try:
            self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except (psycopg.errors.FeatureNotSupported, psycopg.errors.UndefinedFile) as fault:
            raise DataError(
                f"{self._place}: the server has no pgvector ({one_line(fault)}). Install it there first"
            ) from fault
        except psycopg.errors.InsufficientPrivilege as fault:
            raise DataError(
                f"{self._place}: this user may not add pgvector to the database. Let an administrator run: "
                "CREATE EXTENSION vector"
            ) from fault

    def _create(self) -> None:
        self._connection.execute(self._sql(_CREATE))
        self._connection.execute(self._sql("COMMENT ON TABLE {table} IS {about}"))

    def _index(self) -> bool:
        """Whether there is an index by inner product already.

        Raises:
            MismatchError: If it was built with other options.
        """
        wanted = {"m": str(self._layout.m), "ef_construction": str(self._layout.ef_construction)}
        with self._answers():
            rows = self._connection.execute(_INDEXES, [self._name(), f"{self._kind}_ip_ops"]).fetchall()
        for name, options in rows:
            found = dict(option.split("=", 1) for option in options or [])
            if found == wanted:
                return True
            remedy = "Give these options, or drop the index and start again"
            raise MismatchError(f"index {name!r}", "options", wanted, found, remedy)
        return False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A transaction in which no other publication makes the same table or its index."""
        with self._connection.transaction():
            self._connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [self._name()])
            yield

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Turn the driver's errors into the package's: a lost connection, or what the server refused."""
        try:
            yield
        except psycopg.Error as fault:
            if self._connection.closed:
                raise lost(self._place, fault) from fault
            raise DataError(f"{self._place}: table {self._layout.table!r}: {one_line(fault)}") from fault


def open_pgvector(url: str, layout: Layout) -> PgTable:
    """Connect to a database and make its table ready.

    Args:
        url: ``postgresql://user@host:5432/database``, or libpq's ``key=value`` form. A password is better kept in
            ``PGPASSWORD`` or ``~/.pgpass``; where it is in the URL, no message repeats it.
        layout: The table. Its name is one identifier, in the first schema of the search path.

    Raises:
        ConfigError: If the URL, the name or the width cannot be.
        ConnectionError: If the server cannot be reached.
        MismatchError: If the table was made from something else.
        DataError: If the server has no pgvector, or refuses.
    """
    _check_layout(layout)
    place, values = _parse(url)
    try:
        connection = psycopg.connect(**values, autocommit=True, client_encoding="utf8")
    except psycopg.Error as fault:
        # From None: the driver's own message may carry what was in the URL.
        remedy = "Check host, port, user and that the server runs, then start again"
        raise lost(place, _without(str(fault), values.get("password")), remedy) from None
    try:
        table = PgTable(connection, layout, place)
        table.prepare()
    except BaseException:
        connection.close()
        raise
    return table


def _parse(url: str) -> tuple[str, dict[str, Any]]:
    """The database without its password, and libpq's parameters."""
    try:
        values: dict[str, Any] = conninfo.conninfo_to_dict(url)
    except psycopg.Error:
        # Neither the URL nor libpq's message is repeated: both may hold the password.
        raise ConfigError(
            "--url: not a PostgreSQL connection string. Write postgresql://user@host:5432/database, with characters "
            "like / @ : % and spaces percent-encoded"
        ) from None
    host, port = values.get("host") or values.get("hostaddr") or "the default host", values.get("port")
    user = f"{values['user']}@" if values.get("user") else ""
    place = f"postgresql://{user}{host}{f':{port}' if port else ''}/{values.get('dbname') or ''}"
    return place, {"connect_timeout": _CONNECT_SECONDS, **values}


def _without(message: str, password: str | None) -> str:
    return message.replace(password, "***") if password else message


def _check_layout(layout: Layout) -> None:
    faults = []
    if not layout.table or "\0" in layout.table or len(layout.table.encode("utf-8", "replace")) > _LONGEST_NAME:
        faults.append(f"--table: {layout.table!r}: PostgreSQL takes names of 1 to {_LONGEST_NAME} bytes, without NUL")
    kind = "halfvec" if layout.half else "vector"
    if layout.index and layout.dim > _WIDEST_INDEXED[kind]:
        other = "--no-index" if layout.half else "--halfvec (up to 4000) or --no-index"
        faults.append(f"{layout.dim} dimensions: HNSW over {kind} takes {_WIDEST_INDEXED[kind]}. Give {other}")
    if faults:
        raise ConfigError(faults)


def _read_comment(comment: str | None) -> dict[str, object]:
    try:
        about = json.loads(comment or "{}")
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}
