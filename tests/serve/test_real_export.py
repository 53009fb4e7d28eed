"""A real student, exported by clipdistill.formats and served by a process of its own, answers as it does in PyTorch."""

import base64
import os
import re
import shutil
import signal
import subprocess
import sys

import httpx
import numpy as np
import pytest
from runtime import tiny_export
from training import little

from clipdistill.formats import Probe, export
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.search import Searcher

pytestmark = pytest.mark.slow

TEXTS, PICTURES = tiny_export.TEXTS[:12], tiny_export.pictures(14)
KEYS = [f"{number}.png" for number in range(14)]
LEAST = {"fp32": 0.99999, "int8": 0.995}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A student, and a folder with its export and the index of its own picture embeddings."""
    folder, student = tmp_path_factory.mktemp("real"), little.student()
    export(student, folder / "small", ("onnx",), tuple(LEAST), probe=Probe.of(student, TEXTS, PICTURES))
    index = VectorIndex.build(student.encode_images(PICTURES), KEYS, encoder=student.fingerprint)
    index.save(folder / "index")
    return folder, Searcher(student, index)


def call(*args):
    return [sys.executable, "-m", "clipdistill", "serve", *args, "--port", "0", "--threads", "1"]


@pytest.fixture(scope="module", params=LEAST)
def served(request, made):
    """The address of a service of the export, which must end well when it is told to."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    args = call("small", "--index", "index", "--precision", request.param)
    process = subprocess.Popen(args, cwd=made[0], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + process.stderr.read()
        with httpx.Client(base_url=found[0], timeout=20) as client:
            yield client, request.param
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=20)[1]
        assert (process.returncode, log) == (0, "")
    finally:
        process.kill()


def assert_same(found, wanted, precision):
    """The same names in the same order, but for neighbours that are nearer to each other than rounding."""
    slack = 2e-6 if precision == "fp32" else 0.05
    assert len(found) == len(wanted)
    np.testing.assert_allclose([hit["score"] for hit in found], [hit.score for hit in wanted], atol=slack)
    scores = {hit.key: hit.score for hit in wanted}
    for left, right in zip(found, wanted, strict=True):
        assert left["key"] == right.key or abs(scores[left["key"]] - right.score) <= 2 * slack


def test_hits_are_the_pytorch_students(served, made):
    (client, precision), own = served, made[1]
    for text in filter(str.strip, TEXTS):
        found = client.post("/search", json={"text": text, "k": 14}).json()["hits"]
        assert_same(found, own.by_text(text, 14), precision)
    for place in (0, 5, 13):
        found = client.post("/search?k=14", content=PICTURES[place].read(), headers={"Content-Type": "image/png"})
        hits = found.json()["hits"]
        assert hits[0]["key"] == KEYS[place]
        assert_same(hits, own.by_picture(PICTURES[place], 14), precision)


def test_embeddings_are_the_runtimes_to_the_bit_and_the_students_to_rounding(served, made):
    (client, precision), own = served, made[1]
    encoder = RuntimeEncoder.load(made[0] / "small", precision=precision, threads=1)
    packed = base64.b64encode(PICTURES[3].read()).decode()
    for given, rows, wanted in (
        (TEXTS[2], encoder.encode_texts([TEXTS[2]]), own.encoder.encode_texts([TEXTS[2]])),
        ({"image": packed}, encoder.encode_images(PICTURES[3:4]), own.encoder.encode_images(PICTURES[3:4])),
    ):
        body = client.post("/v1/embeddings", json={"input": given}).json()
        row = np.array(body["data"][0]["embedding"], np.float32)
        np.testing.assert_array_equal(row, rows[0])
        assert row @ wanted[0] >= LEAST[precision]


@pytest.mark.parametrize("name", ["onnx/text_model.onnx", "onnx/vision_model.onnx", "tokenizer.json", "manifest.json"])
def test_a_changed_export_is_not_served(made, tmp_path, name):
    shutil.copytree(made[0] / "small", tmp_path / "small")
    path = tmp_path / "small" / name
    data = bytearray(path.read_bytes())
    if name == "manifest.json":
        path.write_bytes(data.replace(made[1].encoder.fingerprint.encode(), b"0" * 64, 1))
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    done = ended(tmp_path, "small", "--index", str(made[0] / "index"))
    assert done.returncode == 4, done.stderr
    assert ("encoder" if name == "manifest.json" else f"{name}: sha256 does not match") in done.stderr


def test_an_index_of_another_student_is_not_served(made, tmp_path):
    other = little.student(seed=1)
    index = VectorIndex.build(other.encode_images(PICTURES[:3]), KEYS[:3], encoder=other.fingerprint)
    index.save(tmp_path / "index")
    done = ended(made[0], "small", "--index", str(tmp_path / "index"))
    assert done.returncode == 4, done.stderr
    assert f"expected {made[1].encoder.fingerprint}, found {other.fingerprint}" in done.stderr


def ended(folder, *args):
    done = subprocess.run(call(*args), cwd=folder, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done
