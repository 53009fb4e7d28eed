"""What an export's folder may hold, the index that travels in it, and what is left of an export that was killed."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import tiny
from formats import test_export as shared
from training import little

from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, DataError, MismatchError, ParityError
from clipdistill.formats import Probe, export, graphs, verify
from clipdistill.formats.parity import _recall
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.search import Searcher

PAIRS = tiny.pairs(14)
TEXTS = [pair.captions[0] for pair in PAIRS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A text tower alone, with its teacher's index."""
    student, place = shared.query_student(), tmp_path_factory.mktemp("made")
    rows = np.stack([little.Teacher().row(pair.key) for pair in PAIRS])
    VectorIndex.build(rows, [pair.key for pair in PAIRS], encoder="f" * 64).save(place / "index")
    VectorIndex.build(rows, [pair.key for pair in PAIRS], encoder="e" * 64).save(place / "foreign")
    probe = Probe.of(student, TEXTS, gallery=rows)
    report = export(student, place / "export", (), ("fp32",), probe=probe, index=place / "index")
    return student, place, probe, report


def change(folder, **values):
    """Rewrite the manifest; gives the function that puts it back."""
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), **values}))
    return lambda: path.write_text(text)


def test_the_index_travels_and_is_searched_where_it_lies(made):
    student, place, _, report = made
    folder = place / "export"
    assert report.parities[0].recall["index_overlap10"] == 1 and report.vectors == 14
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    for name in ("index.faiss", "ids.jsonl", "manifest.json"):
        assert (folder / "index" / name).read_bytes() == (place / "index" / name).read_bytes()
        assert listed[f"index/{name}"] == fingerprint.of_file(place / "index" / name)
    encoder = RuntimeEncoder.load(folder)
    index = VectorIndex.load(folder / "index", encoder=encoder.fingerprint)
    hits = Searcher(encoder, index).by_text(TEXTS[3], 5)
    own = student.to_teacher_vectors(student.encode_texts([TEXTS[3]]), "text")
    assert [hit.key for hit in hits] == index.keys(index.search(own, 5))[0]
    assert verify(folder).parities[0].recall["index_overlap10"] == 1


def test_the_index_of_another_encoder_is_refused_with_both_fingerprints(made, tmp_path):
    student, place, probe, _ = made
    with pytest.raises(MismatchError) as caught:
        export(student, tmp_path / "made", (), ("fp32",), probe=probe, index=place / "foreign")
    assert all(part in str(caught.value) for part in ("f" * 64, "e" * 64, str(place / "foreign")))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"no manifest\.json"):
        export(student, tmp_path / "made", (), ("fp32",), probe=probe, index=tmp_path)


def test_an_index_swapped_for_another_is_refused_although_its_digests_fit(made):
    _, place, _, _ = made
    folder = place / "export"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    back = {name: (folder / "index" / name).read_bytes() for name in ("index.faiss", "ids.jsonl", "manifest.json")}
    for name in back:
        (folder / "index" / name).write_bytes((place / "foreign" / name).read_bytes())
        listed[f"index/{name}"] = fingerprint.of_file(folder / "index" / name)
    restore = change(folder, files=listed)
    try:
        with pytest.raises(MismatchError, match="encoder does not match"):
            verify(folder)
    finally:
        restore()
        for name, data in back.items():
            (folder / "index" / name).write_bytes(data)


@pytest.mark.parametrize("name", ["onnx/more.onnx", "index/more", "model.py", ".hidden"])
def test_a_file_that_is_not_listed_is_refused_by_name(made, name):
    path = made[1] / "export" / name
    path.write_text("new")
    try:
        with pytest.raises(MismatchError, match="place in the manifest does not match") as caught:
            verify(made[1] / "export")
    finally:
        path.unlink()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["check.npz", "onnx/text_model.onnx", "manifest.json", "onnx"])
def test_a_symbolic_link_is_refused_though_it_leads_to_the_same_bytes(made, name):
    path, kept = made[1] / "export" / name, made[1] / "kept"
    path.rename(kept)
    path.symlink_to(kept)
    try:
        with pytest.raises(MismatchError, match="a symbolic link") as caught:
            verify(made[1] / "export")
    finally:
        path.unlink()
        kept.rename(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "onnx/../../x", "C:\\x", "..\\x", "."])
def test_a_manifest_that_leads_out_of_the_folder_is_refused(made, name):
    folder = made[1] / "export"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    restore = change(folder, files={**listed, name: "0" * 64})
    try:
        with pytest.raises(DataError, match="not the name of a file inside the folder"):
            verify(folder)
    finally:
        restore()


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("onnx/text_model.onnx", lambda data: data[: len(data) // 2], ParityError, "onnxruntime cannot load or run it"),
        ("check.npz", lambda data: data[:100], DataError, "holds no probes"),
        ("check.npz", lambda data: b"", DataError, "holds no probes"),
    ],
)
def test_a_broken_file_is_refused_although_its_digest_fits(made, name, data, error, message):
    folder = made[1] / "export"
    path, listed = folder / name, json.loads((folder / "manifest.json").read_text())["files"]
    whole = path.read_bytes()
    path.write_bytes(data(whole))
    restore = change(folder, files={**listed, name: fingerprint.of_file(path)})
    try:
        with pytest.raises(error, match=message):
            verify(folder)
    finally:
        restore()
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"preprocess": {"size": "abc"}}, "preprocess"), ({"index": 3}, "index is neither"), ({"files": {"a": 1}}, "a")],
)
def test_a_manifest_with_nonsense_in_it_is_a_named_fault(made, values, message):
    folder = made[1] / "export"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    restore = change(folder, **(values if "files" not in values else {"files": {**listed, **values["files"]}}))
    try:
        with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
            verify(folder)
    finally:
        restore()


def test_a_graph_beyond_one_file_is_refused_before_it_is_written(made, monkeypatch):
    model = onnx.load(made[1] / "export/onnx/text_model.onnx")
    assert graphs.serialised(model, "text", "fp32") == (made[1] / "export/onnx/text_model.onnx").read_bytes()
    monkeypatch.setattr(graphs, "LARGEST", 40_000)
    with pytest.raises(ConfigError, match=r"the text tower's graph in fp32 has .* int8 .*student\.text"):
        graphs.serialised(model, "text", "fp32")


def test_a_ranking_of_few_pictures_is_compared_less_deep_and_says_so():
    rows = np.eye(4, 6, dtype=np.float32)
    probe = Probe(np.ones((4, 3), np.int64), relevant=((0,), (1,), (2,), ()))
    expected = {"text": rows, "image": rows}
    other = {"text": rows[[3, 0, 1, 2]], "image": rows}
    found = _recall(probe, other, expected)
    assert set(found) == {"overlap3", "success3", "student_success3"}
    assert found["student_success3"] == 1 and found["overlap3"] < 1
    one = {"text": rows[:1], "image": rows[:1]}
    assert _recall(Probe(np.ones((1, 3), np.int64)), one, one) == {}


KILLED = """
import os, sys
import numpy as np
from clipdistill.formats import Probe, export, folder
from clipdistill.towers.student import DualEncoder

student = DualEncoder.load(sys.argv[1])
folder.measure = lambda *given: os._exit(9)
gallery = np.eye(2, student.teacher_dim, dtype=np.float32)
export(student, sys.argv[2], (), ("fp32",), probe=Probe.of(student, ["a dog", "a cat"], gallery=gallery))
"""


def test_an_export_that_is_killed_leaves_the_older_one_and_nothing_that_looks_finished(made, tmp_path):
    made[0].save(tmp_path / "student")
    old = tmp_path / "exports/made"
    old.mkdir(parents=True)
    before = b'{"kind": "export", "version": 1}'
    (old / "manifest.json").write_bytes(before)
    # A process of its own: a fork would wait for ever on the threads that this one has
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path / "student", old]).returncode == 9
    (left,) = [path for path in old.parent.iterdir() if path != old]
    assert (left / "onnx/text_model.onnx").exists() and not (left / "manifest.json").exists()
    assert (old / "manifest.json").read_bytes() == before
    for refused in (left, left / "onnx"):
        with pytest.raises(DataError, match=r"no manifest\.json"):
            verify(refused)
        with pytest.raises(DataError, match="no"):
            RuntimeEncoder.load(refused)
