"""The verb as a user starts it: an export served by a process of its own, over real sockets, until it is stopped."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import httpx
import numpy as np
import pytest
import tiny
from runtime import tiny_export

from clipdistill.core.errors import ConfigError
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.runtime.alone import OneByOne
from clipdistill.search import Searcher
from clipdistill.serve.app import create_app
from clipdistill.serve.options import Options
from clipdistill.serve.run import _listen
from clipdistill.stages.serve import Served, build_app

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An export, pictures, and the index over them."""
    folder = tmp_path_factory.mktemp("served")
    tiny_export.write(folder / "small", precisions=("fp32", "int8"))
    (folder / "goods").mkdir()
    pictures = tiny_export.pictures(9)
    for number, picture in enumerate(pictures):
        (folder / f"goods/{number}.png").write_bytes(picture.read())
    rows = RuntimeEncoder.load(folder / "small").encode_images(pictures)
    keys = [f"goods/{number}.png" for number in range(9)]
    VectorIndex.build(rows, keys, encoder=tiny_export.ENCODER).save(folder / "index")
    return folder


def start(folder, *further):
    """The process, and the address that its log names."""
    call = [sys.executable, "-m", "clipdistill", "serve", "small", "--index", "index", "--port", "0", *further]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(call, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)
    line = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    if found is None:
        process.kill()
        raise AssertionError(line + process.stderr.read())
    return process, found[0]


@pytest.fixture(scope="module")
def served(made):
    process, address = start(made, "--pictures", "goods")
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client, process
    if process.poll() is None:
        process.terminate()
        process.wait(20)


def test_1_it_answers_as_the_runtime_does(served, made):
    client, _ = served
    encoder = RuntimeEncoder.load(made / "small")
    own = Searcher(encoder, VectorIndex.load(made / "index", encoder=encoder.fingerprint))
    hits = client.post("/search", json={"text": tiny.caption(3), "k": 4}).json()["hits"]
    assert [(h["key"], h["score"]) for h in hits] == [(h.key, h.score) for h in own.by_text(tiny.caption(3), 4)]
    data = (made / "goods/5.png").read_bytes()
    found = client.post("/search?k=1", content=data, headers={"Content-Type": "image/png"}).json()["hits"][0]
    assert (found["key"], found["item"]) == ("goods/5.png", "/items/goods/5.png")
    assert client.get(found["item"]).headers["content-type"] == "image/jpeg"
    body = client.post("/v1/embeddings", json={"input": tiny.caption(3), "model": "small"}).json()
    row = np.array(body["data"][0]["embedding"], np.float32)
    np.testing.assert_array_equal(row, encoder.encode_texts([tiny.caption(3)])[0])
    assert body["usage"]["prompt_tokens"] == np.count_nonzero(encoder.tokenizer.encode([tiny.caption(3)]))
    assert "server" not in client.get("/healthz").headers


def test_2_large_bodies_and_other_hosts_are_refused_over_a_socket(served):
    client, _ = served
    large = client.post("/search", content=b"x" * (17 << 20), headers={"Content-Type": "image/png"})
    assert (large.status_code, large.headers["content-type"]) == (413, "application/problem+json")
    chunked = client.post("/search", content=iter([b"x" * (9 << 20)] * 2), headers={"Content-Type": "image/png"})
    assert chunked.status_code == 413
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 421
    address = client.base_url
    with socket.create_connection((address.host, address.port)) as raw:  # no HTTP at all, and half a request
        raw.sendall(b"\x00\x01 nonsense\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    with socket.create_connection((address.host, address.port)) as raw:
        raw.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert client.get("/healthz").status_code == 200


ENDLESS = {
    "address": (b"GET /", b"x"),
    "header": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: ", b"y"),
    "headers": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", b"Z: z\r\n"),
    "extension": (b"POST /search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"e"),
    "trailer": (b"POST /search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nT: ", b"t"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_2_what_never_becomes_a_body_is_cut_off(served, name):
    start, more = ENDLESS[name]
    client, _ = served
    sent = 0
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as raw:
        raw.sendall(start)
        with pytest.raises(ConnectionError):
            while sent < 64 << 20:
                raw.sendall(more * 8192)
                sent += len(more) * 8192
    assert sent < 16 << 20  # what the sockets' buffers hold, not the service
    assert client.get("/healthz").status_code == 200


def test_3_sigterm_ends_it_and_nothing_that_was_asked_is_in_its_log(served):
    client, process = served
    client.post("/search", json={"text": "a secret wish"})
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert "secret" not in log
    with pytest.raises(httpx.ConnectError):
        client.get("/healthz")


def test_a_stop_finishes_the_requests_that_have_begun(tmp_path):
    script = (
        "import sys, threading; from little_service import *; from clipdistill.serve.app import create_app;"
        "from clipdistill.serve.run import run; import logging; logging.basicConfig(level=logging.INFO);"
        "made = searcher(gallery(sys.argv[1], each=1), ColourEncoder()); made.encoder.pause_s = 1.5;"
        "say = lambda: made.encoder.entered.wait() and print('begun', file=sys.stderr, flush=True);"
        "threading.Thread(target=say, daemon=True).start();"
        "run(create_app(made), port=0)"
    )
    paths = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    call = [sys.executable, "-c", script, str(tmp_path / "goods")]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})
    address = re.search(r"http://\S+", process.stderr.readline())[0]
    answers = []
    body = {"text": "red", "k": 1}
    thread = threading.Thread(target=lambda: answers.append(httpx.post(f"{address}/search", json=body, timeout=20)))
    thread.start()
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    thread.join(20)
    _, log = process.communicate(timeout=20)
    assert answers[0].json()["hits"][0]["key"] == "goods/red/0.png"
    assert process.returncode == 0
    assert "Traceback" not in log


def test_the_index_that_an_export_holds_is_served_where_no_other_is_given(made, tmp_path):
    from fastapi.testclient import TestClient

    shutil.copytree(made / "small", tmp_path / "whole")
    shutil.copytree(made / "index", tmp_path / "whole/index")
    alone, other = Served(tmp_path / "whole"), Served(made / "small", made / "index", compare=tmp_path / "whole")
    for given in (alone, other):
        with TestClient(build_app(given, Options())) as client:
            found = client.post("/search", json={"text": "red", "k": 3, "compare": True}).json()
            assert len(found["hits"]) == 3
            assert (found["compared"] is not None) == (given.compare is not None)


def test_small_packets_do_not_wait_for_each_other():
    """An answer's head and body are two; a client acknowledges the first only after 40 ms."""

    class Seen(asyncio.Protocol):
        def connection_made(self, transport):
            accepted.set_result(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async def run():
        nonlocal accepted
        accepted = asyncio.get_running_loop().create_future()
        listening = _listen("127.0.0.1", 0)
        async with await asyncio.get_running_loop().create_server(Seen, sock=listening):
            with socket.create_connection(listening.getsockname()):
                assert await accepted

    accepted = None
    asyncio.run(run())


def call(folder, *args):
    return subprocess.run(
        [sys.executable, "-m", "clipdistill", "serve", *args], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_what_cannot_be_served_ends_with_its_exit_code_and_a_next_step(made, tmp_path):
    other = np.eye(3, tiny_export.DIM, dtype=np.float32)
    VectorIndex.build(other, list("abc"), encoder="0" * 64).save(tmp_path / "index")
    cases = [
        (["nothing", "--index", "index"], 2, "export: nothing: not a folder"),
        (["small", "--index", "nothing"], 2, "index: nothing: not a folder"),
        (["small", "--index", str(tmp_path / "index")], 4, "expected " + tiny_export.ENCODER),
        (["small", "--index", "index", "--compare", "small"], 2, "small holds none. Give one with --index"),
        (["small", "--index", "index", "--waiting", "3"], 2, "serve.waiting: 3"),
    ]
    for args, code, words in cases:
        done = call(made, *args, "--port", "0")
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = call(made, "small", "--index", "index", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "cannot listen there: Address already in use" in done.stderr


def test_a_missing_library_is_named_with_its_pip_line(made):
    script = (
        "import sys; sys.modules['fastapi'] = None;"
        "sys.argv = ['clipdistill', 'serve', 'small', '--index', 'index']; from clipdistill.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=made, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr == "error: fastapi is not installed. Install it with: pip install 'clipdistill[serve]'\n"


def test_serving_imports_no_torch(made):
    script = (
        "import sys, json; from pathlib import Path; from clipdistill.stages.serve import *;"
        "from clipdistill.serve.run import run; small, index = Path('small'), Path('index');"
        "build_app(Served(small, index, compare=small, compare_index=index), Options());"
        "print(json.dumps([m for m in ('torch', 'open_clip', 'transformers') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=made, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout or "null") == [], done.stderr


def test_two_exports_are_compared_and_int8_goes_one_by_one(made):
    from fastapi.testclient import TestClient

    both = Served(made / "small", made / "index", compare=made / "small", compare_index=made / "index")
    with TestClient(build_app(both, Options())) as client:
        body = client.post("/search", json={"text": "cat", "k": 2, "compare": True}).json()
    assert (body["model"], body["compared"]["model"]) == ("small", "small (compared)")
    assert body["hits"] == body["compared"]["hits"]
    encoder = RuntimeEncoder.load(made / "small", precision="int8", threads=1)
    seen = []

    class Counted:
        dim, fingerprint = encoder.dim, encoder.fingerprint

        def encode_texts(self, texts, batch=256):
            seen.append(batch)
            return encoder.encode_texts(texts, batch)

        def encode_images(self, pictures, batch=64):
            seen.append(batch)
            return encoder.encode_images(pictures, batch)

    alone = OneByOne(Counted())
    np.testing.assert_array_equal(alone.encode_texts(["a", "b"]), encoder.encode_texts(["a", "b"], 1))
    alone.encode_images(tiny_export.pictures(2))
    assert seen == [1, 1]


def test_each_export_is_served_in_a_precision_that_it_holds_where_none_is_asked_for(made, tmp_path):
    from fastapi.testclient import TestClient

    tiny_export.write(tmp_path / "short", precisions=("int8",))
    both = Served(made / "small", made / "index", variants=(f"{tmp_path / 'short'}={made / 'index'}",))
    with TestClient(build_app(both, Options())) as client:
        names = [one["name"] for one in client.get("/info").json()["models"][0]["variants"]]
        found = [client.post("/search", json={"text": "cat", "k": 9, "variant": name}).json() for name in names]
    assert len(names) == 2
    assert [len(one["hits"]) for one in found] == [9, 9]
    with pytest.raises(ConfigError, match=r"short has no 'fp32' graphs, it holds: int8"):
        build_app(replace(both, precision="fp32"), Options())


def test_a_dual_encoder_in_pytorch_is_served_too(tmp_path):
    from fastapi.testclient import TestClient
    from training import little

    student = little.student()
    pairs = tiny.pairs(6)
    index = VectorIndex.build(
        student.encode_images([pair.picture for pair in pairs]),
        [pair.key for pair in pairs],
        encoder=student.fingerprint,
    )
    own = Searcher(student, index)
    with TestClient(create_app(own)) as client:
        hits = client.post("/search", json={"text": "a red bicycle", "k": 6}).json()["hits"]
    wanted = own.by_text("a red bicycle", 6)
    assert [hit["key"] for hit in hits] == [hit.key for hit in wanted]
    np.testing.assert_allclose([hit["score"] for hit in hits], [hit.score for hit in wanted], atol=1e-6)
