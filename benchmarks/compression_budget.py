"""What the demo's student keeps at ever fewer bytes a vector, towers and index: `make bench-compression`.

The demo's run lies in `runs/demo` and is made where it is not there; its student is then compressed with every
combination of `[compress]`. All choices are made on `val`; the figures are of `test` and `unseen`. A bound is a share
of the bytes of the teacher's float32 vectors, or of the student's own.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from result import write_result

from clipdistill.demo import demo_config
from clipdistill.stages.run import run
from clipdistill.stages.workspace import Workspace

COMMAND = "make bench-compression"
SETS = ("test", "unseen")
_log = logging.getLogger("compression")


def within(curve: Sequence[Mapping[str, Any]], most: float, name: str) -> Mapping[str, Any] | None:
    """What a set reaches with the combination that is best on `val` within so many bytes a vector; None = none is."""
    chosen = [point for point in curve if point["set"] == "val" and point["bytes_per_vector"] <= most]
    if not chosen:
        return None
    best = max(chosen, key=lambda point: (point["retention"], -point["bytes_per_vector"]))
    which = ("dim", "rotation", "factory")
    return next(point for point in curve if point["set"] == name and all(point[key] == best[key] for key in which))


def figures_of(budget: Mapping[str, Any]) -> dict[str, float]:
    """The figures by name: retention against the teacher at a quarter and a tenth of its bytes, and so on."""
    rows = {(row["set"], row["step"]): row for row in budget["rows"]}
    found: dict[str, float] = {}
    for name in SETS:
        teacher, student = (rows[name, f"{who}, exact search"] for who in ("teacher", "student"))
        found |= _named(f"retention_teacher_4x_{name}", within(budget["curve"], teacher["bytes_per_vector"] / 4, name))
        found |= _named(
            f"retention_teacher_10x_{name}", within(budget["curve"], teacher["bytes_per_vector"] / 10, name)
        )
        point = within(budget["curve"], student["bytes_per_vector"] / 8, name)
        if point is not None and student["success"]:
            found[f"kept_of_student_8x_{name}"] = round(point["success"] / student["success"], 4)
            found[f"kept_of_student_8x_{name}_bytes"] = point["bytes_per_vector"]
    return found


def _named(name: str, point: Mapping[str, Any] | None) -> dict[str, float]:
    if point is None or point["retention"] is None:
        return {}
    ends = {f"{name}_{end}": round(point[f"retention_{end}"], 4) for end in ("low", "high")}
    return {name: round(point["retention"], 4), **ends, f"{name}_bytes": point["bytes_per_vector"]}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs") / "demo")
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    return options


def main() -> None:
    """Compress the demo's student, and keep what the issue's bounds ask for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(2)
    started, options = time.monotonic(), parse()
    workspace = Workspace.of(demo_config(options.overrides, options.folder), options.folder)
    figures = figures_of(run(workspace, until="compress"))
    for name, value in figures.items():
        _log.info("%s: %s", name, value)
    if options.dry:
        return
    bars = {f"retention_teacher_4x_{name}": {"at_least": 0.95} for name in SETS}
    bars |= {f"kept_of_student_8x_{name}": {"at_least": 0.97} for name in SETS}
    seconds = time.monotonic() - started
    path = write_result("compression", figures, bars, seeds=[17], seconds=seconds, command=COMMAND)
    _log.info("%s", path)


if __name__ == "__main__":
    main()
