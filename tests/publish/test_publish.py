"""Where the rows come from, what each database's own part adds, and the verb."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from publish.made import rows_of, unit_rows
from typer.testing import CliRunner

from clipdistill.core.errors import ConfigError, DataError, MismatchError, MissingExtraError
from clipdistill.publish.databases import open_target, publish_to, read_rows
from clipdistill.publish.rows import Rows
from clipdistill.publish.target import Layout
from clipdistill.retrieval.exact import exact_top_k
from clipdistill.retrieval.index import VectorIndex

ENCODER = "c" * 64


def saved(folder, count=300, factory="Flat"):
    rows = rows_of(count, encoder=ENCODER)
    keys, vectors = rows.part(0, count)
    VectorIndex.build(vectors, keys, factory=factory, encoder=ENCODER).save(folder)
    return rows


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "SQ8,RFlat", "IVF4,PQ4x4fs,RFlat"])
def test_an_index_that_keeps_its_vectors_gives_them_bit_for_bit(tmp_path, factory):
    rows = saved(tmp_path / "index", factory=factory)
    found = read_rows(tmp_path / "index")
    assert (found.keys, found.encoder, found.dim) == (rows.keys, ENCODER, 32)
    assert found.part(0, 300)[1].tobytes() == rows.part(0, 300)[1].tobytes()


@pytest.mark.parametrize("factory", ["SQ8", "PQ4", "OPQ4,Flat", "IVF4,SQ8", "HNSW8,SQ8", "SQfp16", "SQ4,Refine(SQ8)"])
def test_an_index_that_compresses_its_vectors_is_refused_with_the_next_step(tmp_path, factory):
    saved(tmp_path / "index", factory=factory)
    with pytest.raises(DataError, match=r"keeps its vectors compressed.*Flat.*\.npy"):
        read_rows(tmp_path / "index")


def test_a_changed_index_is_refused(tmp_path):
    saved(tmp_path / "index")
    path = tmp_path / "index" / "index.faiss"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(MismatchError, match="sha256"):
        read_rows(tmp_path / "index")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_npy_with_ids(tmp_path, dtype, suffix):
    vectors = unit_rows(4).astype(dtype)
    np.save(tmp_path / "v.npy", vectors)
    keys = ["a", "b c", "写真", "d\u2028e"]
    lines = [json.dumps(key) if suffix == "jsonl" else key for key in keys]
    (tmp_path / f"ids.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = read_rows(tmp_path / "v.npy", tmp_path / f"ids.{suffix}", ENCODER)
    assert list(rows.keys) == keys
    assert rows.part(1, 3)[0] == ("b c", "写真")
    assert rows.part(0, 4)[1].tobytes() == vectors.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        (unit_rows(2), "a\na\n", "occurs twice"),
        (unit_rows(2), "a\n\n", "not empty"),
        (unit_rows(2), "a\nb\0\n", "no NUL"),
        (unit_rows(2), "a\n", "2 vectors and 1 ids"),
        (2 * unit_rows(2), "a\nb\n", "length 2"),
        (np.full((1, 4), np.nan, np.float32), "a\n", "length nan"),
        (unit_rows(2).astype(np.float64), "a\nb\n", "float64"),
        (unit_rows(2)[0], "a\n", "shape"),
        (np.array([{"a": 1}], object), "a\n", "not a NumPy file"),
        (None, "a\n", "not a NumPy file"),
    ],
)
def test_rows_that_cannot_be_published_are_named(tmp_path, vectors, ids, message):
    if vectors is None:
        (tmp_path / "v.npy").write_bytes(b"no numbers")
    else:
        np.save(tmp_path / "v.npy", vectors, allow_pickle=True)
    (tmp_path / "ids.txt").write_text(ids)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "v.npy", tmp_path / "ids.txt", ENCODER)


def test_keys_that_are_no_text_are_refused():
    for key in (7, "\ud800"):
        with pytest.raises(DataError, match="row 0"):
            Rows([key], unit_rows(1), ENCODER)
    with pytest.raises(DataError, match="encoder"):
        Rows(["a"], unit_rows(1), "")


def test_what_does_not_go_together_is_refused(tmp_path):
    layout = Layout("items", 32, ENCODER)
    with pytest.raises(ConfigError, match="did you mean 'pgvector'"):
        open_target("pgvecto", "x", layout)
    with pytest.raises(ConfigError, match="--halfvec"):
        open_target("lancedb", str(tmp_path), Layout("items", 32, ENCODER, half=True))
    for m, effort in ((1, 64), (16, 31), (16, 1001), (101, 1000), (-5, 64)):
        with pytest.raises(ConfigError, match="--ef-construction"):
            open_target("lancedb", str(tmp_path), Layout("items", 32, ENCODER, m=m, ef_construction=effort))
    with pytest.raises(ConfigError, match="--ids"):
        read_rows(tmp_path / "v.npy")
    with pytest.raises(ConfigError, match=r"--ids and --encoder go with a \.npy"):
        read_rows(tmp_path, encoder=ENCODER)


@pytest.mark.parametrize(
    ("database", "module", "package"),
    [
        ("pgvector", "psycopg", "psycopg"),
        ("pgvector", "pgvector", "pgvector"),
        ("lancedb", "lancedb", "lancedb"),
        ("qdrant", "qdrant_client", "qdrant-client"),
    ],
)
def test_a_missing_client_is_named_with_its_pip_line(database, module, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"clipdistill.publish.{database}", raising=False)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed.*clipdistill\[publish\]"):
        open_target(database, str(tmp_path), Layout("items", 32, ENCODER))


def test_a_large_lance_table_is_indexed_and_brought_up_to_date(tmp_path):
    rows, queries = rows_of(10_000, dim=16, encoder=ENCODER), unit_rows(10, dim=16, seed=4)
    layout = Layout("items", 16, ENCODER)
    done = publish_to(rows, "lancedb", str(tmp_path), layout, batch=5000)
    assert done.index == "HNSW over int8, m 16, ef_construction 64"
    keys, vectors = rows.part(0, 10_000)
    exact = exact_top_k(queries, vectors, 10).ids
    target = open_target("lancedb", str(tmp_path), layout)
    hits = [{hit.key for hit in target.nearest(query, 10)} for query in queries]
    assert np.mean([len(found & {keys[i] for i in ids}) for found, ids in zip(hits, exact, strict=True)]) >= 8
    again = publish_to(Rows(["later"], queries[:1], ENCODER), "lancedb", str(tmp_path), layout)
    assert again.index == "the one that was there, brought up to date"
    assert open_target("lancedb", str(tmp_path), layout).nearest(queries[0], 1)[0].key == "later"


def test_two_publications_at_once_into_one_lance_table_leave_no_key_twice(tmp_path):
    import lancedb

    rows, layout = rows_of(600, encoder=ENCODER), Layout("items", 32, ENCODER)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(publish_to, rows, "lancedb", str(tmp_path), layout, 50 + n) for n in range(2)]
        assert [job.result().total for job in jobs][-1] == 600
    keys = lancedb.connect(tmp_path).open_table("items").to_arrow()["key"].to_pylist()
    assert sorted(keys) == sorted(rows.keys)


def test_qdrant_in_memory_and_the_folder_of_another_process(tmp_path):
    layout = Layout("items", 32, ENCODER)
    assert publish_to(rows_of(5, encoder=ENCODER), "qdrant", ":memory:", layout).total == 5
    first = open_target("qdrant", str(tmp_path / "base"), layout)
    with pytest.raises(DataError, match="already accessed"):
        open_target("qdrant", str(tmp_path / "base"), layout)
    first.close()


def test_a_server_that_cannot_name_the_encoder_is_refused_and_left_as_it_was(tmp_path, monkeypatch):
    from qdrant_client import QdrantClient

    create = QdrantClient.create_collection
    # What a server before 1.16 does: it ignores the field.
    monkeypatch.setattr(QdrantClient, "create_collection", lambda *a, metadata, **k: create(*a, **k))
    with pytest.raises(DataError, match="no metadata"):
        open_target("qdrant", str(tmp_path), Layout("items", 32, ENCODER))
    client = QdrantClient(path=str(tmp_path))
    assert not client.collection_exists("items")
    client.close()


@pytest.mark.parametrize(
    "url", ["https://me:s3cret@host:6333", "http://host:6333?api-key=s3cret", "ftp://s3cret@host", "http://s3cret:x:y"]
)
def test_a_secret_in_a_qdrant_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="--url") as refused:
        open_target("qdrant", url, Layout("items", 32, ENCODER))
    assert "s3cret" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_an_unreachable_qdrant_is_named(monkeypatch):
    monkeypatch.setenv("QDRANT_API_KEY", "s3cret")
    with pytest.raises(ConnectionError, match=r"goes on by key.*http://127\.0\.0\.1:1") as refused:
        open_target("qdrant", "http://127.0.0.1:1", Layout("items", 32, ENCODER))
    assert "s3cret" not in str(refused.value)


def test_the_verb(tmp_path):
    from clipdistill.cli import app

    rows = saved(tmp_path / "index")
    command = ["publish", str(tmp_path / "index"), "--to", "lancedb", "--table", "items", "--batch", "128", "--json"]
    for written in (300, 0):
        shown = CliRunner().invoke(app, command, env={"CLIPDISTILL_PUBLISH_URL": str(tmp_path / "base")})
        assert shown.exit_code == 0, shown.output
        said = json.loads(shown.stdout.splitlines()[-1])
        assert said.pop("seconds") > 0
        assert said == {"rows": 300, "written": written, "unchanged": 300 - written, "total": 300, "index": None}
    found = open_target("lancedb", str(tmp_path / "base"), Layout("items", 32, ENCODER))
    assert found.count() == len(rows)


def test_the_verb_ends_with_a_code_and_no_traceback(tmp_path):
    saved(tmp_path / "index", count=3)
    command = [sys.executable, "-m", "clipdistill", "publish", str(tmp_path / "index"), "--to", "pgvector"]
    command += ["--table", "items", "--url", "postgresql://me:s3cret@127.0.0.1:1/base"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: postgresql://me@127.0.0.1:1/base: ")
    for absent in ("Traceback", "s3cret"):
        assert absent not in ended.stderr + ended.stdout
