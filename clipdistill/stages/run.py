"""The whole job: data, teacher cache, student, index, evaluation, report; each stage skips what is already done."""

from __future__ import annotations

from typing import Any

from clipdistill.core import files
from clipdistill.core.errors import DataError
from clipdistill.report.html import write_report
from clipdistill.stages.blocks import check_blocks
from clipdistill.stages.compress import SCHEMA, compress
from clipdistill.stages.evaluate import evaluate
from clipdistill.stages.index import build_index
from clipdistill.stages.inputs import RunData, load_data, open_cache
from clipdistill.stages.teachers import first_teacher, open_teachers, whole_teacher
from clipdistill.stages.train import check_losses, train
from clipdistill.stages.workspace import Workspace, read_metrics
from clipdistill.training.run import OnLog

STAGES = ("cache", "train", "index", "evaluate", "report")


def run(
    workspace: Workspace, *, until: str = "report", force: bool = False, on_log: OnLog | None = None
) -> dict[str, Any]:
    """Do the stages of a run up to one of them.

    Args:
        workspace: The run.
        until: The last stage: one of ``STAGES``, or ``compress``, which comes after ``train`` and is made only if asked
            for.
        force: Make that stage again although it is done; the stages before it are kept.
        on_log: Called with each line of the training's metrics; what it raises ends the training.

    Returns:
        The report's plain values where the run was evaluated, else what the last stage made, in a few facts.
    """
    if until != "cache":
        check_losses(workspace.config)
    workspace.begin()
    data = load_data(workspace)
    teachers = open_teachers(workspace.config)
    check_blocks(workspace.config, first_teacher(teachers))
    cache, data = open_cache(workspace, data, teachers, force=force and until == "cache")
    if until == "cache":
        facts = {key: cache.facts.get(key) for key in ("pictures", "texts", "dim", "views", "teacher")}
        return {**facts, "folder": str(cache.folder), "fingerprint": cache.fingerprint}
    student = train(workspace, data, cache, teachers, force=force and until == "train", on_log=on_log)
    if until == "train":
        return {
            "folder": str(workspace.student),
            "parameters": student.parameters,
            "fingerprint": student.fingerprint,
            **_best(workspace),
        }
    if until == "index":
        index = build_index(workspace, data, cache, student, force=force)
        return {"folder": str(workspace.index), "vectors": len(index), "factory": index.factory}
    teacher = whole_teacher(workspace.config, teachers)
    if until == "compress":
        budget = compress(workspace, data, cache, student, teacher, force=force)
        if workspace.report_json.exists():
            make_report(workspace, data)
        return budget
    report = evaluate(workspace, data, cache, student, teacher, force=force)
    if until == "evaluate":
        return report
    build_index(workspace, data, cache, student, force=force)
    make_report(workspace, data)
    return report


def run_all(workspace: Workspace, *, force: bool = False) -> dict[str, Any]:
    """The whole job, from the beginning where ``force`` is given.

    The teacher cache in a folder of its own (``cache.folder``) is kept even then: it may serve other runs.
    """
    if force:
        for stage in (*STAGES, "compress"):
            workspace.note(stage).unlink(missing_ok=True)
        made = (workspace.training, workspace.student, workspace.combined, workspace.mutual, workspace.index)
        for path in (*made, workspace.compressed, workspace.recovery, workspace.export, workspace.folder / "cache"):
            _remove(path)
    return run(workspace)


def make_report(workspace: Workspace, data: RunData | None = None) -> None:
    """Write ``report.html`` from ``report.json``, the training's metrics and the data's pictures.

    Raises:
        DataError: If the run was not evaluated yet.
    """
    if not workspace.report_json.exists():
        raise DataError(f"{workspace.report_json}: not there yet. Make it with: clipdistill evaluate RUN.toml")
    rows = data or load_data(workspace)
    pictures = {pair.key: pair.picture for pair in rows.pairs if pair.picture is not None}
    report = files.read_json(workspace.report_json)
    strips, budget = workspace.config.report.strips, _budget(workspace, report)
    write_report(workspace.report_html, report, read_metrics(workspace), pictures, strips=strips, budget=budget)


def _budget(workspace: Workspace, report: dict[str, Any]) -> dict[str, Any] | None:
    """The recall budget of the compressed student; None where there is none of the student that was evaluated."""
    if not workspace.budget_json.exists():
        return None
    budget = dict(files.read_json(workspace.budget_json))
    same = budget["student_fingerprint"] == report.get("student_fingerprint")
    return budget if same and budget["schema"] == SCHEMA else None


def _best(workspace: Workspace) -> dict[str, Any]:
    scored = [row for row in read_metrics(workspace) if "score" in row]
    if not scored:
        return {}
    last = [row for row in scored if row.get("phase") == scored[-1].get("phase")]  # the student is of the last one
    best = max(last, key=lambda row: row["score"])
    return {"best_step": best["step"], "best_score": best["score"]}


def _remove(path: Any) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)
