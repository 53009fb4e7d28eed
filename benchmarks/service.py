"""What HTTP adds to a search: `make bench-service`, after `make demo`.

The demo's student is exported and served by a process of its own, with an index of random unit vectors. Each text is
searched for through the service, over one kept connection, and by the service's parts in this process: tokenise and
encode, then search. The two take turns, one thread each. Then several clients ask at once. Any other run is measured
with `--run FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import torch
from result import tell, write_result

from clipdistill.config import RunConfig
from clipdistill.formats import Probe, export
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.search import Searcher
from clipdistill.stages.inputs import load_data
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.student import DualEncoder

COMMAND = "make bench-service"
BARS = {"http_over_parts": {"at_most": 1.3}}
WARM = 50
_log = logging.getLogger("service")


class Client:
    """One kept connection that does no more than it must: what it costs itself is not the service's.

    Args:
        host: The service's address.
        port: Its port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._host = host

    def search(self, text: str) -> bytes:
        """Search for a text: the body of the answer."""
        body = json.dumps({"text": text, "k": 10}).encode()
        head = f"POST /search HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the service answered {data[:500]!r}")
        length = int(re.search(rb"(?i)content-length: *(\d+)", head)[1])
        while len(body) < length:
            body += self._more()
        return body

    def _more(self) -> bytes:
        data = self._socket.recv(1 << 16)
        if not data:
            raise RuntimeError("the service closed the connection")
        return data


@contextmanager
def served(exported: Path, index: Path, precision: str) -> Iterator[int]:
    """A service in a process of its own: its port."""
    call = [sys.executable, "-m", "clipdistill", "serve", str(exported), "--index", str(index), "--port", "0"]
    call += ["--threads", "1", "--precision", precision]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise RuntimeError(line + process.stderr.read())
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def in_turn(port: int, searcher: Searcher, texts: Sequence[str], count: int) -> dict[str, float]:
    """The medians of a search through the service and of its parts, which take turns, in milliseconds."""
    client, tokenizer = Client("127.0.0.1", port), searcher.encoder.tokenizer
    taken: dict[str, list[float]] = {name: [] for name in ("http", "tokenise", "encode", "search", "parts")}
    told: dict[str, list[float]] = {"encode": [], "search": []}

    def over_http(text: str) -> None:
        started = time.perf_counter()
        body = client.search(text)
        taken["http"].append(time.perf_counter() - started)
        answer = json.loads(body)
        for name, values in told.items():
            values.append(answer["latency_ms"][name])

    def by_parts(text: str) -> None:
        started = time.perf_counter()
        tokenizer.encode([text])
        between = time.perf_counter()
        row = searcher.encoder.encode_texts([text])[0]  # tokenises too
        encoded = time.perf_counter()
        searcher.by_vector(row, 10)
        ended = time.perf_counter()
        taken["tokenise"].append(between - started)
        taken["encode"].append(encoded - between)
        taken["search"].append(ended - encoded)
        taken["parts"].append(ended - between)

    for place in range(count + WARM):
        text = texts[place % len(texts)]
        for way in (over_http, by_parts) if place % 2 else (by_parts, over_http):
            way(text)
    figures = {f"{name}_p50_ms": 1000 * statistics.median(values[WARM:]) for name, values in taken.items()}
    figures |= {f"service_{name}_p50_ms": statistics.median(values[WARM:]) for name, values in told.items()}
    figures["http_p95_ms"] = 1000 * float(np.quantile(taken["http"][WARM:], 0.95))
    figures["http_over_parts"] = figures["http_p50_ms"] / figures["parts_p50_ms"]
    return figures


def together(port: int, texts: Sequence[str], clients: int, count: int) -> dict[str, float]:
    """Searches a second of several clients, each of which asks again as soon as it is answered."""
    barrier, each = threading.Barrier(clients + 1), count // clients

    def ask(number: int) -> None:
        client = Client("127.0.0.1", port)
        client.search(texts[number])
        barrier.wait()
        for place in range(each):
            client.search(texts[(number * each + place) % len(texts)])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return {f"searches_per_s_{clients}_clients": clients * each / (time.perf_counter() - started)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs") / "demo")
    parser.add_argument("--vectors", type=int, default=10_000)
    parser.add_argument("--count", type=int, default=1000, help="searches of each way")
    parser.add_argument("--clients", type=int, default=8, help="that ask at once")
    parser.add_argument("--precision", default="fp32", help="of the graphs: fp32 or int8")
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    return parser.parse_args(arguments)


def main() -> None:
    """Export the run's student, serve it, and measure."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    started, options = time.monotonic(), parse()
    workspace = Workspace(RunConfig.load(options.run / "run.toml"), options.run)
    student, exported = DualEncoder.load(workspace.student), options.run / f"export_{options.precision}"
    pairs = list(load_data(workspace).sets.values())[-1].pairs
    texts = list(dict.fromkeys(text for pair in pairs for text in pair.captions if text.strip()))[:512]
    pictures = [pair.picture for pair in pairs[:32] if pair.picture is not None and student.searches is None]
    export(student, exported, ("onnx",), (options.precision,), probe=Probe.of(student, texts[:64], pictures))
    encoder = RuntimeEncoder.load(exported, precision=options.precision, threads=1)
    rows = np.random.default_rng(0).standard_normal((options.vectors, encoder.dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    keys = [f"pictures/{number:06d}.png" for number in range(len(rows))]
    index = VectorIndex.build(rows, keys, encoder=encoder.fingerprint)
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        with served(exported, Path(folder) / "index", options.precision) as port:
            figures = in_turn(port, Searcher(encoder, index), texts, options.count)
            figures |= together(port, texts, options.clients, options.count)
    figures = {name: round(value, 3) for name, value in {**figures, "dim": encoder.dim}.items()}
    tell(_log, figures, BARS)
    if not options.dry:
        seconds = time.monotonic() - started
        path = write_result("service", figures, BARS, seeds=[workspace.config.seed], seconds=seconds, command=COMMAND)
        _log.info("%s", path)


if __name__ == "__main__":
    main()
