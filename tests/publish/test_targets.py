"""What publishing promises, the same for each database, against real ones."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from publish.made import rows_of, unit_rows

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.publish.databases import open_target, publish_to
from clipdistill.publish.rows import Rows
from clipdistill.publish.target import Layout, publish
from clipdistill.retrieval.exact import exact_top_k

DATABASES = ["pgvector", "lancedb", "qdrant"]
K = 10


@pytest.fixture(params=DATABASES)
def database(request):
    return request.param


@pytest.fixture
def url(database, tmp_path, request):
    return request.getfixturevalue("postgres") if database == "pgvector" else str(tmp_path / "base")


@pytest.fixture
def table(request, database):
    return "".join(c if c.isalnum() else "_" for c in request.node.name)[:60]


def layout_of(table, rows, **changes):
    return replace(Layout(table, rows.dim, rows.encoder), **changes)


def held(database, url, layout):
    """All rows of a table by key, read with the database's own client and none of the package's code."""
    if database == "pgvector":
        import psycopg
        from psycopg import sql

        with psycopg.connect(url) as connection:
            query = sql.SQL("SELECT key, embedding::text FROM {}").format(sql.Identifier(layout.table))
            return {key: np.array(text[1:-1].split(","), np.float32) for key, text in connection.execute(query)}
    if database == "lancedb":
        import lancedb

        table = lancedb.connect(url).open_table(layout.table).to_arrow().to_pydict()
        assert len(set(table["key"])) == len(table["key"])
        return {key: np.array(row, np.float32) for key, row in zip(table["key"], table["vector"], strict=True)}
    from qdrant_client import QdrantClient

    with closing(QdrantClient(path=url)) as client:
        points, _ = client.scroll(layout.table, limit=10**6, with_vectors=True)
        assert len({point.payload["key"] for point in points}) == len(points)
        return {point.payload["key"]: np.array(point.vector, np.float32) for point in points}


def check_same(found, rows):
    keys, vectors = rows.part(0, len(rows))
    assert set(found) == set(keys)
    for key, vector in zip(keys, vectors, strict=True):
        assert found[key].tobytes() == vector.tobytes(), key


def test_rows_in_are_rows_out_and_neighbours_are_the_exact_ones(database, url, table):
    rows, queries = rows_of(500), unit_rows(20, seed=9)
    layout = layout_of(table, rows)
    done = publish_to(rows, database, url, layout, batch=128)
    assert (done.rows, done.written, done.unchanged, done.total) == (500, 500, 0, 500)
    check_same(held(database, url, layout), rows)
    keys, vectors = rows.part(0, 500)
    exact = exact_top_k(queries, vectors, K)
    with closing(open_target(database, url, layout)) as target:
        assert target.count() == 500
        for query, ids, scores in zip(queries, exact.ids, exact.scores, strict=True):
            found = target.nearest(query, K, exact=True)
            assert [hit.key for hit in found] == [keys[i] for i in ids]
            np.testing.assert_allclose([hit.score for hit in found], scores, atol=2e-6)


def test_a_second_time_nothing_is_written_and_a_changed_row_replaces_the_old_one(database, url, table):
    rows = rows_of(60)
    layout = layout_of(table, rows)
    publish_to(rows, database, url, layout, batch=25)
    again = publish_to(rows, database, url, layout, batch=25)
    assert (again.written, again.unchanged, again.total) == (0, 60, 60)
    keys, vectors = rows.part(0, 60)
    vectors = vectors.copy()
    vectors[7] = -vectors[7]
    changed = Rows([*keys[:50], "a new one"], np.concatenate([vectors[:50], vectors[59:]]), rows.encoder)
    third = publish_to(changed, database, url, layout, batch=25)
    assert (third.written, third.unchanged, third.total) == (2, 49, 61)  # the ten that are not named stay
    found = held(database, url, layout)
    assert found[keys[7]].tobytes() == vectors[7].tobytes()
    assert found[keys[55]].tobytes() == vectors[55].tobytes()


class Falls:
    """A target that fails at one batch, as a process that is killed there would."""

    def __init__(self, target, at):
        self.target, self.left = target, at

    def __getattr__(self, name):
        return getattr(self.target, name)

    def upsert(self, keys, vectors):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.target.upsert(keys, vectors)


def test_interrupted_in_the_middle_it_goes_on_by_key(database, url, table):
    rows = rows_of(100)
    layout = layout_of(table, rows)
    with closing(open_target(database, url, layout)) as target, pytest.raises(KeyboardInterrupt):
        publish(rows, Falls(target, at=3), batch=15)
    assert len(held(database, url, layout)) == 45
    done = publish_to(rows, database, url, layout, batch=20)  # another size of batch is no obstacle
    assert (done.written, done.unchanged, done.total) == (55, 45, 100)
    check_same(held(database, url, layout), rows)


def test_rows_of_another_encoder_or_width_are_refused(database, url, table):
    rows = rows_of(20)
    publish_to(rows, database, url, layout_of(table, rows))
    for other, values in (
        (rows_of(20, encoder="b" * 64), ("a" * 64, "b" * 64)),
        (rows_of(20, dim=16), ("32", "16")),
    ):
        with pytest.raises(MismatchError) as refused:
            publish_to(other, database, url, layout_of(table, other))
        for part in (*values, "--table", table):
            assert part in str(refused.value)
    check_same(held(database, url, layout_of(table, rows)), rows)


def test_no_rows_at_all(database, url, table):
    rows = Rows([], np.empty((0, 32), np.float32), "a" * 64)
    done = publish_to(rows, database, url, layout_of(table, rows))
    assert (done.rows, done.written, done.total) == (0, 0, 0)
    with closing(open_target(database, url, layout_of(table, rows))) as target:
        assert target.nearest(unit_rows(1)[0], 5) == []
    assert publish_to(rows_of(3), database, url, layout_of(table, rows)).total == 3


HOSTILE = [
    'x"; DROP TABLE victim; --',
    "'; DROP TABLE victim; --",
    "../../outside",
    "a/b",
    "%s {} {table}",
    "",
    "n\0l",
    "é" * 300,
]
TAKEN = {"pgvector": {0, 1, 2, 3, 4}, "lancedb": set(), "qdrant": {1, 4}}


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_table_names_are_taken_literally_or_refused(database, url, tmp_path, number):
    rows = rows_of(5)
    layout = layout_of(HOSTILE[number], rows)
    publish_to(rows, database, url, layout_of("victim", rows))
    if number in TAKEN[database]:
        publish_to(rows, database, url, layout)
        check_same(held(database, url, layout), rows)
    else:
        with pytest.raises(ConfigError, match="--table"):
            publish_to(rows, database, url, layout)
    check_same(held(database, url, layout_of("victim", rows)), rows)
    assert {path.name for path in tmp_path.iterdir()} <= {"base"}


STRANGE = [
    " ",
    "a ",
    "a",
    "A",
    "é",
    "e\u0301",
    "\\",
    "\\'",
    "''",
    "'",
    '"',
    "%",
    "%s",
    "a\nb",
    "\t",
    "null",
    "NULL",
    "0",
    "00",
    "🙂",
    "x" * 2000,
    "$1",
    ":key",
    "{}",
    "\x7f",
    "\u202e",
    "); --",
]


def test_strange_keys_stay_apart_and_come_back(database, url, table):
    rows = Rows(STRANGE, unit_rows(len(STRANGE)), "a" * 64)
    for written in (len(STRANGE), 0):
        assert publish_to(rows, database, url, layout_of(table, rows), batch=5).written == written
    check_same(held(database, url, layout_of(table, rows)), rows)


def test_k_and_batch_are_bounded(database, url, table):
    rows = rows_of(5)
    with closing(open_target(database, url, layout_of(table, rows))) as target:
        publish(rows, target)
        assert len(target.nearest(unit_rows(1)[0], 1000)) == 5
        for k in (0, 10**9):
            with pytest.raises(ValueError, match="k must be"):
                target.nearest(unit_rows(1)[0], k)
    with pytest.raises(ConfigError, match="--batch"):
        publish_to(rows, database, url, layout_of(table, rows), batch=0)


def test_what_is_not_a_database_is_refused(database, tmp_path):
    rows = rows_of(2)
    layout = layout_of("items", rows)
    (tmp_path / "file").write_text("not a folder")
    wrong = {"pgvector": "mysql://u:s3cret@h/db", "lancedb": str(tmp_path / "file"), "qdrant": str(tmp_path / "file")}
    with pytest.raises((ConfigError, DataError, OSError)) as refused:
        open_target(database, wrong[database], layout)
    assert "s3cret" not in str(refused.value)
