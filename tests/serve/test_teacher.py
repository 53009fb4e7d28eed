"""A run's own teacher beside the student: its hits are those of its stored embeddings."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from fastapi.testclient import TestClient
from runtime import tiny_export

from clipdistill.cache import TeacherCache
from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.retrieval.exact import exact_top_k
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.serve.options import Options
from clipdistill.stages.inputs import load_data
from clipdistill.stages.run import run
from clipdistill.stages.serve import Served, build_app
from clipdistill.stages.teachers import open_teachers
from clipdistill.stages.workspace import Workspace

pytestmark = pytest.mark.slow
PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with its teacher's embeddings, and an export with an index of the same pictures."""
    folder = tmp_path_factory.mktemp("beside")
    workspace = Workspace.of(RunConfig.load(tiny.run_toml(folder)), folder / "run")
    run(workspace, until="cache")
    tiny_export.write(folder / "small")
    pairs = [pair for name, source in load_data(workspace).sets.items() if name != "val" for pair in source.pairs]
    encoder = RuntimeEncoder.load(folder / "small", threads=1)
    keys = [pair.key for pair in pairs]
    VectorIndex.build(encoder.encode_images([p.picture for p in pairs]), keys, encoder=encoder.fingerprint).save(
        folder / "index"
    )
    return folder, workspace, keys


def served(folder, **more):
    return replace(Served(folder / "small", folder / "index", threads=1, teacher=folder / "run"), **more)


def test_its_hits_for_words_and_pictures_are_shown_beside(made):
    folder, workspace, keys = made
    rows = TeacherCache.open(workspace.cache).image_rows(keys)
    teacher = open_teachers(workspace.config)[0]
    data = (folder / "test/p035.png").read_bytes()
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (folder / "run").rglob("*")}
    with TestClient(build_app(served(folder, pictures=folder / "run"), Options())) as client:
        assert [model["name"] for model in client.get("/info").json()["models"]] == ["small", "teacher"]
        text = client.post("/search", json={"text": tiny.caption(3), "k": 9, "compare": True}).json()["compared"]
        shown = client.post("/search?k=1&compare=true", content=data, headers=PNG).json()
        body = client.post("/v1/embeddings", json={"input": tiny.caption(3), "model": "teacher"}).json()
        item = client.get(shown["compared"]["hits"][0]["item"])
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (folder / "run").rglob("*")} == before
    query = teacher.encode_texts([tiny.caption(3)])
    wanted = exact_top_k(query, rows, 9)
    assert [hit["key"] for hit in text["hits"]] == [keys[row] for row in wanted.ids[0]]
    np.testing.assert_allclose([hit["score"] for hit in text["hits"]], wanted.scores[0], atol=1e-6)
    np.testing.assert_allclose(body["data"][0]["embedding"], query[0], atol=1e-6)
    assert shown["compared"]["hits"][0]["key"].endswith("p035.png")
    assert shown["compared"]["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert item.headers["content-type"] == "image/jpeg"  # the run's own pictures, wherever they lie


def test_an_index_of_the_teacher_serves_instead_of_the_runs_own_rows(made):
    folder, workspace, keys = made
    teacher = open_teachers(workspace.config)[0]
    rows = TeacherCache.open(workspace.cache).image_rows(keys)
    VectorIndex.build(rows[:5], keys[:5], encoder=teacher.fingerprint).save(folder / "theirs")
    with TestClient(build_app(served(folder, teacher_index=folder / "theirs"), Options())) as client:
        body = client.post("/search", json={"text": "a cat", "k": 20, "compare": True}).json()
    assert {hit["key"] for hit in body["compared"]["hits"]} == set(keys[:5])
    with pytest.raises(MismatchError, match="encoder does not match"):
        build_app(served(folder, teacher_index=folder / "index"), Options())


def test_a_text_tower_alone_is_helped_with_pictures(made):
    folder, workspace, keys = made
    teacher = open_teachers(workspace.config)[0]
    rows = TeacherCache.open(workspace.cache).image_rows(keys)
    tiny_export.write(
        folder / "words",
        pictures=False,
        encoder=teacher.fingerprint,
        dim=tiny_export.DIM,
        searches={"name": teacher.name, "fingerprint": teacher.fingerprint},
    )
    VectorIndex.build(rows, keys, encoder=teacher.fingerprint).save(folder / "teachers")
    given = served(folder, export=folder / "words", index=folder / "teachers")
    data = (folder / "test/p035.png").read_bytes()
    with TestClient(build_app(given, Options())) as client:
        assert [model["pictures"] for model in client.get("/info").json()["models"]] == [True, True]
        body = client.post("/search?k=1&compare=true", content=data, headers=PNG).json()
    assert body["hits"][0]["key"] == body["compared"]["hits"][0]["key"] != ""
    assert body["hits"][0]["key"].endswith("p035.png")


def test_a_run_that_cannot_be_asked_is_refused(made, tmp_path):
    folder, workspace, _ = made
    with pytest.raises(DataError, match=r"of 1 of the 1 indexed pictures \(the first: elsewhere\)"):
        encoder = RuntimeEncoder.load(folder / "small", threads=1)
        VectorIndex.build(encoder.encode_texts(["a cat"]), ["elsewhere"], encoder=encoder.fingerprint).save(
            tmp_path / "i"
        )
        build_app(served(folder, index=tmp_path / "i"), Options())
    (tmp_path / "run").mkdir()
    alone = (workspace.folder / "run.toml").read_text()
    (tmp_path / "run/run.toml").write_text(alone)
    with pytest.raises(DataError, match=r"clipdistill cache RUN\.toml"):
        build_app(served(folder, teacher=tmp_path / "run"), Options())
    lines = [line for line in alone.splitlines() if not line.startswith("model = ")]
    place = lines.index("[teacher]")
    lines.insert(place + 1, f'embeddings = "{workspace.cache}"\nlogit_scale = 100.0')
    (tmp_path / "run/run.toml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="no more than a teacher's embeddings"):
        build_app(served(folder, teacher=tmp_path / "run"), Options())
