"""The demo: the whole job on the embedded data, down to a proved export, its figures held against their bars."""

from __future__ import annotations

import logging
import resource
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdistill.config import RunConfig
from clipdistill.core import fingerprint, toml
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.demo_teacher import assemble_teacher, demo_student_weights
from clipdistill.formats import ExportReport, verify
from clipdistill.formats.layouts import check_packages
from clipdistill.stages.export import export_run
from clipdistill.stages.inputs import name_checks
from clipdistill.stages.run import run, run_all
from clipdistill.stages.workspace import Workspace

_log = logging.getLogger("clipdistill")
WEIGHTS = "open_clip_model.safetensors"
SHIPPED = ("open_clip", "onnx")


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach.

    Attributes:
        bound: The value.
        at_least: Whether the figure must not be below it; else it must not be above it.
        timed: Whether the figure depends on how busy the machine is: a miss is then shown, and fails nothing.
        aim: What would be good, where that is more than the bar.
    """

    bound: float
    at_least: bool = True
    timed: bool = False
    aim: float | None = None

    def met(self, value: float) -> bool:
        """Whether a figure reaches the bar."""
        return value >= self.bound if self.at_least else value <= self.bound


BARS: Mapping[str, Bar] = {
    "seconds": Bar(480, at_least=False, timed=True),
    "peak_rss_mb": Bar(3 * 1024, at_least=False, timed=True),
    "parameters_ratio": Bar(4.5),
    "images_per_s_ratio": Bar(4, timed=True),
    "texts_per_s_ratio": Bar(8, timed=True),
    "retention10_unseen": Bar(0.90, aim=0.97),
    "retention10_unseen_query_side": Bar(0.93, aim=0.98),
    "retention10_test": Bar(0.88, aim=0.97),
    "overlap10_unseen": Bar(0.22, aim=0.40),
    "overlap10_unseen_query_side": Bar(0.50, aim=0.65),
    "shipped_disk_ratio": Bar(10),
    "shipped_vector_ratio": Bar(8),
    "shipped_kept10_test": Bar(0.95),
    "shipped_kept10_unseen": Bar(0.95),
}


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """What the demo measured.

    Attributes:
        workspace: The run.
        report: Its report.
        budget: Its recall budget.
        exported: The student's export, as it was proved when it was written; it was verified once more since.
        figures: The figures by name.
        missed: The bars that make the demo fail: every one that is missed and is not timed.
    """

    workspace: Workspace
    report: Mapping[str, Any]
    budget: Mapping[str, Any]
    exported: ExportReport
    figures: Mapping[str, float | str]
    missed: tuple[str, ...]


def run_demo(overrides: Sequence[str], out: Path, *, force: bool = False) -> DemoOutcome:
    """Assemble the teacher from the demo's wheels, run the whole job on the embedded data, compress and export.

    Args:
        overrides: ``section.key=value`` each.
        out: The run's folder.
        force: Begin anew, the teacher's embeddings included, which are then computed into the run's folder.

    Raises:
        MissingExtraError: If the demo's wheels, or the libraries that the export needs, are not installed.
        DataError: If the embedded data are not at hand.
        ParityError: If the exported student does not embed as it does in PyTorch.
    """
    started = time.monotonic()
    check_packages(SHIPPED)
    workspace = Workspace.of(demo_config(overrides, out, rebuild=force), out)
    report = run_all(workspace, force=force)
    budget = run(workspace, until="compress")
    exported = export_run(workspace)
    verify(exported.folder)
    figures = demo_figures(report, workspace, time.monotonic() - started) | shipped_figures(budget)
    missed = [name for name, bar in BARS.items() if not bar.timed and not bar.met(float(figures[name]))]
    return DemoOutcome(workspace, report, budget, exported, figures, tuple(missed))


def demo_config(overrides: Sequence[str], out: Path, *, rebuild: bool = False) -> RunConfig:
    """The demo's configuration, with the teacher assembled and the student's first weights written below ``out``.

    Args:
        overrides: ``section.key=value`` each.
        out: The run's folder.
        rebuild: Leave the shipped teacher cache aside: the run computes its own.
    """
    data = embedded_data()
    out = out.resolve()
    raw = tomllib.loads((data / "demo.toml").read_text(encoding="utf-8"))
    raw["teacher"]["model"] = f"local-dir:{assemble_teacher(out / 'teacher', data / 'teacher' / 'heads.safetensors')}"
    raw["student"]["image_weights"] = str(demo_student_weights(out / "student_start.safetensors"))
    if rebuild:
        del raw["cache"]["folder"]
    faults = list(toml.apply_overrides(raw, overrides))
    if faults:
        raise ConfigError(faults)
    return RunConfig.parse(raw, data, checks=[name_checks])


def embedded_data() -> Path:
    """The repository's ``data`` folder: beside the package, or in the present folder.

    Raises:
        DataError: If it is in neither: the wheel does not carry it.
    """
    for folder in (Path(__file__).resolve().parent.parent / "data", Path.cwd() / "data"):
        if (folder / "demo.toml").is_file():
            return folder
    raise DataError("data/demo.toml: not found: the demo's data come with the repository. Run it inside a clone of it.")


def demo_figures(report: Mapping[str, Any], workspace: Workspace, seconds: float) -> dict[str, float | str]:
    """The demo's figures by name, from its report; all of text-to-image, exact search."""
    teacher, student = report["sizes"]["teacher"], report["sizes"]["student"]
    fast, slow = report["speeds"]["student"], report["speeds"]["teacher"]
    query_side = "student_query_teacher_index"
    return {
        "seconds": round(seconds, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "parameters_ratio": teacher["parameters"] / student["parameters"],
        "images_per_s_ratio": fast["images_per_s"] / slow["images_per_s"],
        "texts_per_s_ratio": fast["texts_per_s"] / slow["texts_per_s"],
        "retention10_unseen": _value(report, "retention", "unseen", "student"),
        "retention10_unseen_query_side": _value(report, "retention", "unseen", query_side),
        "retention10_test": _value(report, "retention", "test", "student"),
        "overlap10_unseen": _value(report, "overlap", "unseen", "student"),
        "overlap10_unseen_query_side": _value(report, "overlap", "unseen", query_side),
        "overlap10_test": _value(report, "overlap", "test", "student"),
        "student_sha256": fingerprint.of_file(workspace.student / WEIGHTS),
    }


def shipped_figures(budget: Mapping[str, Any]) -> dict[str, float]:
    """What the compressed and exported student keeps of the uncompressed one's success@10, and how small it is.

    Args:
        budget: The recall budget.

    Returns:
        ``shipped_disk_ratio``, the teacher's float32 weights over the files that the runtime loads;
        ``shipped_vector_ratio``, the student's float32 vectors over the index's; ``shipped_kept10_SET``.
    """
    rows = {(row["set"], row["kind"]): row for row in budget["rows"]}
    figures = {}
    for name in ("test", "unseen"):
        teacher, whole, shipped = (rows[name, kind] for kind in ("teacher", "student", "runtime"))
        figures["shipped_disk_ratio"] = teacher["megabytes"] / shipped["megabytes"]
        figures["shipped_vector_ratio"] = whole["bytes_per_vector"] / shipped["bytes_per_vector"]
        figures[f"shipped_kept10_{name}"] = shipped["success"] / whole["success"]
    return figures


def peak_rss_mb() -> float:
    """The most memory that this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / (1 << 20)


def _value(report: Mapping[str, Any], measure: str, name: str, pairing: str) -> float:
    wanted = {
        "measure": measure,
        "k": 10,
        "set": name,
        "pairing": pairing,
        "search": "exact",
        "direction": "text_to_image",
    }
    for row in report["evaluation"]["rows"]:
        if all(row[field] == value for field, value in wanted.items()):
            return float(row["value"] if row["value"] is not None else float("nan"))
    raise DataError(f"the report has no row for {wanted}")
