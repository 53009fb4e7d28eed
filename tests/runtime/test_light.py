"""A fresh process that searches an export: what it imports, how long it takes, and how much memory it needs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runtime import tiny_export

from clipdistill.data.records import Picture
from clipdistill.retrieval.index import VectorIndex
from clipdistill.runtime import RuntimeEncoder

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
FIRST_SEARCH = Path(__file__).resolve().parents[2] / "benchmarks" / "first_search.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an export, its index and a picture; and the index's rows."""
    folder = tmp_path_factory.mktemp("exports")
    tiny_export.write(folder / "export")
    rows = tiny_export.unit(np.random.default_rng(0).standard_normal((9, tiny_export.DIM))).astype(np.float32)
    VectorIndex.build(rows, list("abcdefghi"), encoder=tiny_export.ENCODER).save(folder / "index")
    (folder / "it.png").write_bytes(tiny_export.pictures(1)[0].read())
    return folder, rows


@pytest.mark.parametrize("kind", ["text", "picture"])
def test_a_fresh_process_searches_without_the_heavy_libraries_and_below_300_megabytes(made, kind, record_property):
    folder, rows = made
    query = str(folder / "it.png") if kind == "picture" else "a red cat"
    started = time.perf_counter()
    call = [sys.executable, str(FIRST_SEARCH), str(folder / "export"), str(folder / "index"), query]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    encoder = RuntimeEncoder.load(folder / "export")
    picture = Picture("it", path=folder / "it.png")
    row = (encoder.encode_images([picture]) if kind == "picture" else encoder.encode_texts([query]))[0]
    assert found["hits"] == ["abcdefghi"[place] for place in np.argsort(-(rows @ row))]
    assert [name for name in found["loaded"] if name in HEAVY] == []
    assert {"onnxruntime", "faiss", "tokenizers", "PIL"} <= set(found["loaded"])
    assert 10 < found["peak_mb"] < 300
    record_property("seconds", seconds)
    record_property("peak_mb", found["peak_mb"])
    print(f"first search by {kind}: {seconds:.2f} s from the start of Python, at most {found['peak_mb']:.0f} MiB")


@pytest.mark.parametrize("module", ["runtime", "search", "retrieval.index", "towers.preprocess", "data.pictures"])
def test_each_part_is_light_by_itself(module):
    script = f"import sys, json, clipdistill.{module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert f"clipdistill.{module}" in loaded
    assert [name for name in (*HEAVY, "onnxruntime") if name in loaded] == []
