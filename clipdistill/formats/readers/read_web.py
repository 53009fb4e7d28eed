"""Embed probes in a web bundle's own page: any static host's view of it, in a headless Chromium."""

import functools
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
BROWSER_VARIABLE = "CLIPDISTILL_BROWSER"
_SECONDS, _TOP = 600, 10
_PAGE = b'<!doctype html><meta charset="utf-8"><script type="module" src="/read_web.js"></script>'
_FLAGS = (
    "--headless=new", "--remote-debugging-port=0", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def browser() -> str | None:
    """The Chromium that is at hand: the one that an environment variable names, or the first that is on the path."""
    return os.environ.get(BROWSER_VARIABLE) or next(filter(None, map(shutil.which, BROWSERS)), None)


def main(folder: str, probes: str, out: str, precision: str) -> None:
    """Embed all texts from their spelling on, search with each, and embed the pictures that are given whole."""
    given, bundle = np.load(probes, allow_pickle=False), Path(folder) / "web"
    facts = json.loads((bundle / "bundle.json").read_text("utf-8"))
    names = [name for name in given.files if name.startswith("original_")] if facts["preprocess"] else []
    asked = {
        "texts": json.loads(given["texts"].tobytes()),
        "pictures": [name.removeprefix("original_") for name in names],
        "data": facts["data"],
        "processor": (bundle / facts["data"] / "preprocessor_config.json").exists(),
    }
    pages = {
        "/proof.html": (_PAGE, "text/html"),
        "/read_web.js": (Path(__file__).with_name("read_web.js").read_bytes(), "text/javascript"),
        "/probes": (json.dumps(asked).encode(), "application/json"),
        **{f"/picture/{name.removeprefix('original_')}": (_png(given[name]), "image/png") for name in names},
    }
    program = browser()
    if program is None:
        sys.exit(f"no Chromium (looked for {', '.join(BROWSERS)}, and for {BROWSER_VARIABLE})")
    answer = _answer(program, bundle, pages)
    _write(Path(out), answer, json.loads((bundle / facts["data"] / "keys.json").read_text("utf-8")))
    number = re.search(r"Chrome/(\d+)", answer["agent"])
    sys.stdout.write(f"{answer['version']} in Chromium {number[1] if number else 'of no number'}")


def _write(out: Path, answer: dict[str, Any], keys: list[str]) -> None:
    found: dict[str, Any] = {"text": np.array(answer["text"], np.float32)}
    found["input_ids"] = np.zeros((len(answer["ids"]), max(map(len, answer["ids"]))), np.int64)
    for row, ids in zip(found["input_ids"], answer["ids"], strict=True):
        row[: len(ids)] = ids
    place = {key: row for row, key in enumerate(keys)}
    found["gallery_top"] = np.array([[place[key] for key in row] for row in answer["top"]], np.int64)
    for name, rows in (("image", answer["image"]), ("image_prepared", answer["prepared"])):
        if rows:
            found[name] = np.array(rows, np.float32)
    found |= {f"figure_{name}": np.array(value) for name, value in answer["figures"].items()}
    np.savez(out, **found)


def _png(pixels: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


class _Host(http.server.SimpleHTTPRequestHandler):
    """A static host of the bundle, and of the few pages of the proof."""

    def __init__(self, *given: Any, pages: dict[str, tuple[bytes, str]], answers: list[Any], **more: Any) -> None:
        self._pages, self._answers = pages, answers
        super().__init__(*given, **more)

    def do_GET(self) -> None:
        if self.path not in self._pages:
            return super().do_GET()
        data, kind = self._pages[self.path]
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self._answers.append((self.path, body, self.headers["User-Agent"]))
        self.server.answered.set()  # type: ignore[attr-defined]

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing is logged."""


def _answer(program: str, bundle: Path, pages: dict[str, tuple[bytes, str]]) -> dict[str, Any]:
    answers: list[Any] = []
    handler = functools.partial(_Host, pages=pages, answers=answers, directory=str(bundle))
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.answered = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    alone = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []  # the sandbox refuses root
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        address = f"http://127.0.0.1:{server.server_port}/proof.html"
        command = [program, *_FLAGS, *alone, f"--user-data-dir={profile}", address]
        chromium = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(_SECONDS):
                if server.answered.wait(1) or chromium.poll() is not None:
                    break
        finally:
            chromium.terminate()
            chromium.wait(30)
            server.shutdown()
    if not answers:
        sys.exit(f"{program} gave no answer (exit status {chromium.returncode})")
    path, body, agent = answers[0]
    if path != "/done":
        sys.exit(f"in Chromium: {body}")
    return {**body, "agent": agent}


if __name__ == "__main__":
    main(*sys.argv[1:5])
