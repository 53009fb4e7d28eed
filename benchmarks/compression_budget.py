"""What the demo's student keeps at ever fewer bytes, towers and index: `make bench-compression`.

The demo's run lies in `runs/demo` and is made where it is not there; a copy of it in `runs/compression` is compressed
with every combination of `[compress]`: with all channels of the picture tower, and with 85% of them after a short
recovery. The target is 0.95 of the uncompressed student's success@10; all choices are made on `val`, the figures are of
`test` and `unseen`. `kept` is of the uncompressed student, `retention` of the teacher.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from result import tell, write_result

from clipdistill.core import files
from clipdistill.demo import demo_config
from clipdistill.stages.run import run
from clipdistill.stages.workspace import Workspace

COMMAND = "make bench-compression"
SETS = ("test", "unseen")
TARGET = (
    "compress.target.of=student",
    "compress.target.retention=0.95",
    "compress.prune=[1.0,0.85]",
    "compress.recovery_steps=200",
    'compress.precisions=["fp32","int8"]',
)
BARS: dict[str, dict[str, float]] = {
    **{f"kept_{name}": {"at_least": 0.95} for name in SETS},
    "times_smaller_on_disk": {"at_least": 10},
    **{f"kept_{name}_at_8x": {"at_least": 0.97} for name in SETS},
    **{f"retention_{name}_at_4x": {"at_least": 0.95} for name in SETS},
    "pruned_kept_val": {"at_least": 0.95},
}
"""What the figures have to reach: of the chosen combination, and at an eighth and a quarter of the bytes a vector."""
_COPIED = ("student", "stages", "report.json", "training/metrics.jsonl")
_WHICH = ("dim", "rotation", "factory", "share", "precision")
_log = logging.getLogger("compression")


def within(curve: Sequence[Mapping[str, Any]], most: float, name: str) -> Mapping[str, Any] | None:
    """What a set reaches with the combination that is best on `val` within so many bytes a vector; None = none is."""
    chosen = [point for point in curve if point["set"] == "val" and point["bytes_per_vector"] <= most]
    if not chosen:
        return None
    best = max(chosen, key=lambda point: (point["retention"], -point["bytes_per_vector"], -point["megabytes"]))
    return next(point for point in curve if point["set"] == name and all(point[key] == best[key] for key in _WHICH))


def figures_of(budget: Mapping[str, Any]) -> dict[str, float]:
    """The figures by name: the chosen combination as it is shipped, each step, and the curve at some of its points."""
    rows = {(row["set"], row["kind"]): row for row in budget["rows"]}
    one, teacher, student = budget["chosen"], rows[SETS[0], "teacher"], rows[SETS[0], "student"]
    found: dict[str, float] = {
        **dict.fromkeys(BARS, 0.0),  # what no combination reaches is missed, and not left out
        **{f"chosen_{key}": one[key] for key in ("share", "dim", "bytes_per_vector", "megabytes")},
        "chosen_int8": float(one["precision"] == "int8"),
        "teacher_megabytes": teacher["megabytes"],
        "times_smaller_on_disk": round(teacher["megabytes"] / one["megabytes"], 2),
        "times_fewer_bytes_a_vector": round(student["bytes_per_vector"] / one["bytes_per_vector"], 2),
    }
    for name in SETS:
        found |= _steps([row for row in budget["rows"] if row["set"] == name], name)
        found[f"kept_{name}"] = round(rows[name, "runtime"]["success"] / rows[name, "student"]["success"], 4)
        point = within(budget["curve"], student["bytes_per_vector"] / 8, name)
        if point is not None:
            found[f"kept_{name}_at_8x"] = round(point["success"] / rows[name, "student"]["success"], 4)
            found[f"kept_{name}_at_8x_bytes"] = point["bytes_per_vector"]
        for times, label in ((4, "retention_{}_at_4x"), (10, "best_retention_{}_at_10x")):
            point = within(budget["curve"], teacher["bytes_per_vector"] / times, name)
            found |= _named(label.format(name), point)
    return found | _pruned(budget) | _speeds(rows)


def _pruned(budget: Mapping[str, Any]) -> dict[str, float]:
    """What fewer channels, int8 graphs and a cut keep at best of the uncompressed student, on `val`."""
    within_8x = budget["rows"][0]["bytes_per_vector"] / 8
    found = [
        one
        for one in budget["candidates"]
        if one["share"] < 1 and one["precision"] == "int8" and one["bytes_per_vector"] <= within_8x
    ]
    if not found:
        return {"pruned_kept_val": 0.0}  # a bar that nothing reaches is missed, not left out
    best = max(found, key=lambda one: (one["retention"], -one["bytes_per_vector"]))
    return {"pruned_kept_val": best["retention"], "pruned_share": best["share"], "pruned_megabytes": best["megabytes"]}


def _steps(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """What each step reaches and loses."""
    return {
        f"{row['kind']}_{key}_{name}": round(row[field], 4)
        for row in rows
        for key, field in (("success10", "success"), ("overlap10", "overlap"), ("lost", "lost"))
    }


def _named(name: str, point: Mapping[str, Any] | None) -> dict[str, float]:
    if point is None or point["retention"] is None:
        return {}
    ends = {f"{name}_{end}": round(point[f"retention_{end}"], 4) for end in ("low", "high")}
    return {name: round(point["retention"], 4), **ends, f"{name}_bytes": point["bytes_per_vector"]}


def _speeds(rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, float]:
    """How much faster the exported runtime is than the teacher, both on one thread."""
    teacher, runtime = rows[SETS[0], "teacher"], rows[SETS[0], "runtime"]
    names = {"pictures_per_s_times": "images_per_s", "texts_per_s_times": "texts_per_s"}
    return {name: round(runtime[key] / teacher[key], 2) for name, key in names.items() if teacher[key] and runtime[key]}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs") / "demo", help="the demo's run; made where missing")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "compression", help="the copy of it")
    parser.add_argument("--no-prune", action="store_true", help="all channels alone, without a recovery of minutes")
    parser.add_argument("--force", action="store_true", help="compress again what was compressed with other settings")
    parser.add_argument("--dry", action="store_true", help="print, and write no result")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    options.demo, options.folder = options.demo.resolve(), options.folder.resolve()
    if options.no_prune:
        options.overrides = ["compress.prune=[]", *options.overrides]
    return options


def copied(source: Path, folder: Path) -> None:
    """Copy of a finished run what a compression needs, where that is not there yet or is of another student."""
    note = Path("stages") / "train.json"
    if (folder / note).exists() and files.read_json(folder / note) == files.read_json(source / note):
        return
    shutil.rmtree(folder, ignore_errors=True)
    for name in _COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, folder / name)
    (folder / "stages" / "compress.json").unlink(missing_ok=True)


def main() -> None:
    """Compress the demo's student, and keep what the issue's bounds ask for."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("clipdistill", _log.name):
        logging.getLogger(name).setLevel(logging.INFO)
    torch.set_num_threads(2)
    started, options = time.monotonic(), parse()
    config = demo_config([*TARGET, *options.overrides], options.demo)
    run(Workspace.of(config, options.demo), until="evaluate")
    copied(options.demo, options.folder)
    workspace = Workspace.of(config, options.folder)
    figures = figures_of(run(workspace, until="compress", force=options.force))
    if (workspace.compressed / "export").exists():
        figures["export_folder_megabytes"] = round(files.folder_bytes(workspace.compressed / "export") / 1e6, 3)
    tell(_log, figures, BARS)
    if options.dry:
        return
    seconds = time.monotonic() - started
    path = write_result("compression", figures, BARS, seeds=[config.seed], seconds=seconds, command=COMMAND)
    _log.info("%s", path)


if __name__ == "__main__":
    main()
