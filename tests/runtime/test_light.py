"""A fresh process that searches an export: what it imports, how long it takes, and how much memory it needs."""

import json
import subprocess
import sys

import numpy as np
import pytest
from runtime import tiny_export

from clipdistill.retrieval.index import VectorIndex

HEAVY = (
    "torch",
    "torchvision",
    "open_clip",
    "timm",
    "transformers",
    "pandas",
    "pyarrow",
    "matplotlib",
    "pydantic",
    "onnx",
)
SCRIPT = """
import json, sys, time
started = time.perf_counter()
from clipdistill.data.records import Picture
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder
from clipdistill.search import Searcher

encoder = RuntimeEncoder.load(sys.argv[1], threads=1)
searcher = Searcher(encoder, VectorIndex.load(sys.argv[2], encoder=encoder.fingerprint))
hits = [hit.key for hit in searcher.by_text("a red cat", k=3)]
seconds = time.perf_counter() - started
shown = [hit.key for hit in searcher.by_picture(Picture("it", data=open(sys.argv[3], "rb").read()), k=1)]
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")][0]
print(json.dumps({"hits": hits, "shown": shown, "seconds": seconds, "megabytes": int(peak) / 1024, "loaded": sorted(
    name for name in sys.modules if "." not in name)}))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What the script reports."""
    folder = tmp_path_factory.mktemp("exports")
    tiny_export.write(folder / "it")
    rows = tiny_export.unit(np.random.default_rng(0).standard_normal((9, tiny_export.DIM))).astype(np.float32)
    VectorIndex.build(rows, list("abcdefghi"), encoder=tiny_export.ENCODER).save(folder / "index")
    (folder / "it.png").write_bytes(tiny_export.pictures(1)[0].read())
    call = [sys.executable, "-c", SCRIPT, *(str(folder / name) for name in ("it", "index", "it.png"))]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


def test_no_heavy_library_is_loaded(fresh):
    assert [name for name in fresh["loaded"] if name in HEAVY] == []
    assert {"onnxruntime", "faiss", "tokenizers", "PIL"} <= set(fresh["loaded"])


def test_it_finds_and_stays_below_300_megabytes(fresh, record_property):
    record_property("seconds_to_first_search", fresh["seconds"])
    record_property("megabytes", fresh["megabytes"])
    print(f"first search after {fresh['seconds']:.2f} s, at most {fresh['megabytes']:.0f} MB")
    assert (len(fresh["hits"]), len(fresh["shown"]), fresh["stderr"]) == (3, 1, "")
    assert set(fresh["hits"]) < set("abcdefghi")
    assert 10 < fresh["megabytes"] < 300


@pytest.mark.parametrize("module", ["runtime", "search", "retrieval.index", "towers.preprocess", "data.pictures"])
def test_each_part_is_light_by_itself(module):
    script = f"import sys, json, clipdistill.{module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert f"clipdistill.{module}" in loaded
    assert [name for name in (*HEAVY, "onnxruntime") if name in loaded] == []
