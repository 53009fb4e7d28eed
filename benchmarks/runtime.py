"""What a search costs without torch: `make bench-runtime`, after `make demo`.

The demo's student is exported, and a text searched for in its index by a fresh process, from the start of Python to the
hits. Then the teacher in ONNX Runtime (float32), the student in PyTorch and its ONNX graphs embed the same pictures and
texts, in turn, one thread each, one at a time and 32 at a time; from the encoded picture or the text to the embedding.
Any other run is measured with `--run FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from onnx_teacher import OnnxTeacher
from result import tell, write_result

from clipdistill.config import RunConfig
from clipdistill.data.records import Picture
from clipdistill.formats import Probe, export
from clipdistill.runtime import RuntimeEncoder
from clipdistill.speed import compare_speed
from clipdistill.stages.inputs import load_data
from clipdistill.stages.teachers import first_teacher, open_teachers
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.encoder import Encoder
from clipdistill.towers.student import DualEncoder

COMMAND = "make bench-runtime"
PRECISIONS = ("fp32", "int8")
BATCHES = (1, 32)
FIRST_SEARCH = Path(__file__).resolve().parent / "first_search.py"
RATIOS = {"images_per_s": 6.0, "texts_per_s": 10.0}
BARS = {"seconds_to_first_search": {"at_most": 2.0}, "peak_mb": {"at_most": 300.0}} | {
    f"fp32_{kind}_batch_{batch}_over_teacher": {"at_least": least}
    for kind, least in RATIOS.items()
    for batch in BATCHES
}
_log = logging.getLogger("runtime")


def inputs_of(workspace: Workspace, count: int) -> tuple[list[Picture], list[str]]:
    """So many pictures and texts of the run's last set."""
    pairs = list(load_data(workspace).sets.values())[-1].pairs
    texts = list(dict.fromkeys(text for pair in pairs for text in pair.captions))
    return [pair.picture for pair in pairs if pair.picture is not None][:count], texts[:count]


def first_searches(exported: Path, index: Path, text: str, precision: str, repeats: int) -> dict[str, float]:
    """The median seconds of fresh processes, and the most memory that one held."""
    seconds, peaks = [], []
    call = [sys.executable, str(FIRST_SEARCH), str(exported), str(index), text, precision]
    for _ in range(repeats):
        started = time.perf_counter()
        done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds.append(time.perf_counter() - started)
        if done.returncode:
            raise RuntimeError(f"the first search ended with {done.returncode}: {done.stderr[-2000:]}")
        peaks.append(json.loads(done.stdout)["peak_mb"])
    return {"seconds_to_first_search": statistics.median(seconds), "peak_mb": max(peaks)}


def rates(encoders: dict[str, Encoder], pictures: list[Picture], texts: list[str]) -> dict[str, float]:
    """Pictures and texts a second of each encoder, and of each student's graphs their ratio to the teacher's."""
    figures: dict[str, float] = {}
    for batch in BATCHES:
        found = compare_speed(encoders, pictures, texts, batch=batch)
        for kind in ("images_per_s", "texts_per_s"):
            if not getattr(found["torch"], kind):
                continue  # a text tower alone embeds no pictures
            for name, speed in found.items():
                figures[f"{name}_{kind}_batch_{batch}"] = getattr(speed, kind)
            for name in PRECISIONS if "teacher" in found else ():
                ratio = getattr(found[name], kind) / getattr(found["teacher"], kind)
                figures[f"{name}_{kind}_batch_{batch}_over_teacher"] = ratio
    return figures


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs") / "demo")
    parser.add_argument("--count", type=int, default=256, help="pictures and texts that are timed")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes")
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    return parser.parse_args(arguments)


def main() -> None:
    """Export the run's student unless it is there, and measure."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    started, options = time.monotonic(), parse()
    workspace = Workspace(RunConfig.load(options.run / "run.toml"), options.run)
    student, exported = DualEncoder.load(workspace.student), options.run / "export_onnx"
    pictures, texts = inputs_of(workspace, options.count)
    if student.searches is not None:
        pictures = []
    export(student, exported, ("onnx",), PRECISIONS, probe=Probe.of(student, texts, pictures))
    figures = {
        f"{name}_{precision}" if precision != "fp32" else name: value
        for precision in PRECISIONS
        for name, value in first_searches(exported, workspace.index, texts[0], precision, options.repeats).items()
    }
    encoders: dict[str, Encoder] = {"torch": student}
    teacher = first_teacher(open_teachers(workspace.config))
    if teacher is not None:  # else its embeddings alone are at hand
        encoders["teacher"] = OnnxTeacher(teacher, 1)
    encoders |= {name: RuntimeEncoder.load(exported, precision=name, threads=1) for name in PRECISIONS}
    figures |= rates(encoders, pictures, texts)
    figures = {name: round(value, 3) for name, value in figures.items()}
    tell(_log, figures, BARS)
    if not options.dry:
        seconds = time.monotonic() - started
        path = write_result("runtime", figures, BARS, seeds=[workspace.config.seed], seconds=seconds, command=COMMAND)
        _log.info("%s", path)


if __name__ == "__main__":
    main()
