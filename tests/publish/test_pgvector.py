"""PostgreSQL: transactions, lost connections, the index, halfvec, and what no message may say."""

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import psycopg
import pytest
from psycopg import sql
from publish.made import rows_of, unit_rows

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.publish.databases import open_target, publish_to
from clipdistill.publish.rows import Rows
from clipdistill.publish.target import Layout, publish
from clipdistill.retrieval.exact import exact_top_k

SECRET = "s3cr3t%2Fpart"


@pytest.fixture
def table(request):
    return "pg_" + request.node.name[:50]


def layout_of(table, rows, **changes):
    return replace(Layout(table, rows.dim, rows.encoder), **changes)


def ask(url, query, *values):
    with psycopg.connect(url) as connection:
        cursor = connection.execute(query, values)
        return cursor.fetchall() if cursor.description else None


def test_half_vectors_are_the_rows_rounded_to_float16(postgres, table):
    rows, queries = rows_of(300), unit_rows(10, seed=5)
    layout = layout_of(table, rows, half=True)
    publish_to(rows, "pgvector", postgres, layout)
    assert publish_to(rows, "pgvector", postgres, layout).written == 0
    found = dict(ask(postgres, f'SELECT key, embedding::text FROM "{table}"'))
    keys, vectors = rows.part(0, 300)
    rounded = vectors.astype(np.float16)
    for key, row in zip(keys, rounded, strict=True):
        assert np.array(found[key][1:-1].split(","), np.float32).astype(np.float16).tobytes() == row.tobytes()
    wide = rounded.astype(np.float32)
    exact = exact_top_k(queries.astype(np.float16).astype(np.float32), wide, 10)
    with closing(open_target("pgvector", postgres, layout)) as target:
        for query, ids in zip(queries, exact.ids, strict=True):
            assert [hit.key for hit in target.nearest(query, 10, exact=True)] == [keys[i] for i in ids]


def test_an_existing_table_of_the_other_type_is_refused(postgres, table):
    rows = rows_of(5)
    publish_to(rows, "pgvector", postgres, layout_of(table, rows))
    with pytest.raises(MismatchError, match="type does not match: expected halfvec, found vector"):
        publish_to(rows, "pgvector", postgres, layout_of(table, rows, half=True))


def test_a_table_that_others_made_is_refused_and_left_alone(postgres, table):
    ask(postgres, f'CREATE TABLE "{table}" (key text, embedding text)')
    ask(postgres, f"""INSERT INTO "{table}" VALUES ('a', 'b')""")
    rows = rows_of(5)
    with pytest.raises(MismatchError, match="made by does not match: expected clipdistill publish, found none"):
        publish_to(rows, "pgvector", postgres, layout_of(table, rows))
    assert ask(postgres, f'SELECT * FROM "{table}"') == [("a", "b")]


class Killed:
    """A target whose server process is ended by another session before one of its batches is written."""

    def __init__(self, target, url, at):
        self.target, self.url, self.left = target, url, at

    def __getattr__(self, name):
        return getattr(self.target, name)

    def upsert(self, keys, vectors):
        self.left -= 1
        if self.left == 0:
            ask(
                self.url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                "AND backend_type = 'client backend'",
            )
        self.target.upsert(keys, vectors)


def test_a_connection_that_is_ended_by_the_server_costs_one_batch(postgres, table):
    rows = rows_of(100)
    layout = layout_of(table, rows)
    with closing(open_target("pgvector", postgres, layout)) as target:
        with pytest.raises(ConnectionError, match="goes on by key"):
            publish(rows, Killed(target, postgres, at=4), batch=15)
        with pytest.raises(ConnectionError):
            target.count()
    assert ask(postgres, f'SELECT count(*) FROM "{table}"') == [(45,)]
    done = publish_to(rows, "pgvector", postgres, layout, batch=15)
    assert (done.written, done.unchanged, done.total) == (55, 45, 100)
    assert ask(postgres, f'SELECT count(*), count(DISTINCT key) FROM "{table}"') == [(100, 100)]


def test_a_batch_that_fails_halfway_leaves_nothing_of_itself(postgres, table):
    rows = rows_of(30)
    layout = layout_of(table, rows)
    with closing(open_target("pgvector", postgres, layout)) as target:
        ask(postgres, f"""ALTER TABLE "{table}" ADD CHECK (key <> 'Zürich 10 写真 🙂')""")
        with pytest.raises(DataError, match="check constraint"):
            publish(rows, target, batch=8)
        assert target.count() == 8
        ask(postgres, f'ALTER TABLE "{table}" DROP CONSTRAINT "{table}_key_check"')
        assert publish(rows, target, batch=8).written == 22  # the same connection is usable again


def test_the_index_has_the_options_is_used_and_finds_the_exact_neighbours(postgres, table):
    rows, queries = rows_of(2000, dim=16), unit_rows(20, dim=16, seed=3)
    layout = layout_of(table, rows, m=12, ef_construction=80)
    assert publish_to(rows, "pgvector", postgres, layout).index == "HNSW, m 12, ef_construction 80"
    made = ask(postgres, "SELECT indexdef FROM pg_indexes WHERE tablename = %s AND indexdef LIKE '%%hnsw%%'", table)
    assert len(made) == 1
    for part in ("USING hnsw", "vector_ip_ops", "m='12'", "ef_construction='80'"):
        assert part in made[0][0]
    plan = ask(
        postgres, f"""EXPLAIN SELECT key FROM "{table}" ORDER BY embedding <#> '{queries[0].tolist()}' LIMIT 10"""
    )
    assert "Index Scan" in plan[0][0] + plan[1][0]
    keys, vectors = rows.part(0, 2000)
    exact = exact_top_k(queries, vectors, 10).ids
    with closing(open_target("pgvector", postgres, layout)) as target:
        hits = [{hit.key for hit in target.nearest(query, 10)} for query in queries]
        shared = [len(found & {keys[i] for i in ids}) for found, ids in zip(hits, exact, strict=True)]
        assert np.mean(shared) >= 9.5
        assert len(target.nearest(queries[0], 200)) == 200  # more than pgvector's own ef_search of 40 would give
    # Rows that come later are in the same index, and no second one is built.
    more = Rows(["later"], queries[:1], rows.encoder)
    publish_to(more, "pgvector", postgres, layout)
    with closing(open_target("pgvector", postgres, layout)) as target:
        assert target.nearest(queries[0], 1)[0].key == "later"
    assert len(ask(postgres, "SELECT 1 FROM pg_indexes WHERE tablename = %s", table)) == 2
    with pytest.raises(MismatchError, match="options does not match"):
        publish_to(rows, "pgvector", postgres, replace(layout, m=16))


def test_without_an_index_there_is_none(postgres, table):
    rows = rows_of(50)
    assert publish_to(rows, "pgvector", postgres, layout_of(table, rows, index=False)).index is None
    assert len(ask(postgres, "SELECT 1 FROM pg_indexes WHERE tablename = %s", table)) == 1


def test_what_the_index_cannot_hold_is_refused_before_anything_is_made(postgres, table):
    layout = Layout(table, 2048, "a" * 64)
    for changes, step in (({}, "--halfvec"), ({"half": True, "dim": 4096}, "--no-index"), ({"m": 64}, "2 m to 1000")):
        with pytest.raises(ConfigError, match=step):
            open_target("pgvector", postgres, replace(layout, **changes))
    assert ask(postgres, "SELECT to_regclass(%s)::text", table) == [(None,)]
    wide = Rows(["a"], unit_rows(1, dim=2048), "a" * 64)
    assert publish_to(wide, "pgvector", postgres, replace(layout, half=True)).total == 1


def test_the_longest_key_fits_and_a_longer_one_is_named(postgres, table):
    noise = np.random.default_rng(0).integers(33, 126, 2601).astype(np.uint8).tobytes().decode()
    layout = Layout(table, 32, "a" * 64)
    assert publish_to(Rows([noise[:2600]], unit_rows(1), "a" * 64), "pgvector", postgres, layout).total == 1
    with pytest.raises(DataError, match="2600 bytes"):
        publish_to(Rows([noise], unit_rows(1), "a" * 64), "pgvector", postgres, layout)


def test_the_comment_names_the_encoder_whatever_it_is(postgres, table):
    encoder = 'it\'s "quoted" \\ %s {}'
    rows = rows_of(3, encoder=encoder)
    for written in (3, 0):
        assert publish_to(rows, "pgvector", postgres, layout_of(table, rows)).written == written
    comment = ask(postgres, "SELECT obj_description(to_regclass(%s), 'pg_class')", table)[0][0]
    assert json.loads(comment)["encoder"] == encoder


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@127.0.0.1:1/base",
        f"host=127.0.0.1 port=1 user=me password={SECRET}",
        f"postgresql://me:{SECRET}@127.0.0.1:54x/base",
        f"postgresql://me:{SECRET} x@127.0.0.1/base",
        f"postgresql://me:{SECRET}%zz@127.0.0.1/base",
        f"mysql://me:{SECRET}@127.0.0.1/base",
    ],
)
def test_an_unreachable_server_is_named_and_its_password_is_not(url, caplog):
    rows = rows_of(1)
    with pytest.raises((ConnectionError, ConfigError)) as refused:
        publish_to(rows, "pgvector", url, layout_of("items", rows))
    shown = "".join(map(str, (refused.value, refused.value.__cause__, caplog.text)))
    assert "s3cr3t" not in shown
    if ":1/" in url:
        assert "me@127.0.0.1:1/base" in shown and "start again" in shown


def test_a_user_who_may_not_make_tables_is_told(postgres):
    ask(postgres, "DROP ROLE IF EXISTS reader")
    ask(postgres, "CREATE ROLE reader LOGIN")
    rows = rows_of(2)
    with pytest.raises(DataError, match="permission denied"):
        publish_to(rows, "pgvector", postgres.replace("postgres:@", "reader@"), layout_of("items", rows))


def test_two_publications_at_once_make_one_table(postgres, table):
    from concurrent.futures import ThreadPoolExecutor

    rows = rows_of(200)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(publish_to, rows, "pgvector", postgres, layout_of(table, rows), 20 + n) for n in range(4)]
        assert [job.result().total for job in jobs] == [200] * 4
    query = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))
    assert ask(postgres, query) == [(200,)]
    assert len(ask(postgres, "SELECT 1 FROM pg_indexes WHERE tablename = %s", table)) == 2
