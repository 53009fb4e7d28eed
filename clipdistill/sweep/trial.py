"""One trial: a run of its own for each seed, measured, and compared with the others while the first one trains."""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdistill.config import RunConfig, evaluation_sets
from clipdistill.core import files, fingerprint, manifest
from clipdistill.core.errors import ConfigError, DataError, MismatchError, MissingExtraError, ParityError
from clipdistill.core.locks import locked
from clipdistill.stages.run import run
from clipdistill.stages.workspace import Workspace, read_metrics
from clipdistill.sweep.axes import Axis, label, trial_config
from clipdistill.sweep.outcome import (
    COMPLETE,
    FAILED,
    PRUNED,
    Outcome,
    SeedResult,
    read_outcome,
    read_outcomes,
    trial_folder,
    write_outcome,
)
from clipdistill.sweep.pruning import comparable, lags
from clipdistill.sweep.study import Study, Taken

_log = logging.getLogger("clipdistill")
_OWN = (ConfigError, DataError, MismatchError, ParityError, MissingExtraError)
# What a library may say to a combination that nobody tried before, such as a tower that does not take a picture's size
# or a batch that does not fit into memory. A fault of the machine (OSError) or of this program stops the sweep instead.
_REFUSALS = (*_OWN, ValueError, RuntimeError, AssertionError, MemoryError)
_MEASURES = ("overlap", "success", "retention")
_NOT_STORED: Mapping[str, Any] = {
    "teacher": {
        "batch": True,
        "device": True,
        "combine": True,
        "members": {"__all__": {"weight", "scale", "batch", "device"}},
    },
    "cache": {"folder": True, "probe_rows": True, "probe_cosine": True, "shard_rows": True},
    "data": {"fraction": True, "max_rejected": True},
}
"""The sections that decide which rows a teacher's cache holds, with the keys that do not. The cache keeps each choice
of inner blocks apart by itself."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The live objects of a sweep.

    Attributes:
        config: Its configuration.
        axes: Its axes.
        out: Its folder.
        base: Where relative paths among the axes' values start.
        study: Its trials.
    """

    config: RunConfig
    axes: Sequence[Axis]
    out: Path
    base: Path
    study: Study


class _Stopped(Exception):  # noqa: N818 - no error: it carries a decision out of the training loop
    """A trial lags behind: the message says at which step."""


def objective_key(config: RunConfig, axes: Sequence[Axis]) -> str:
    """Which value of the validation is maximised.

    The score is the agreement with the teacher. Where the teacher changes, that would favour one that is easy to
    imitate: then it is how often the student is right, as the truth does not depend on the teacher: the success@10 of
    text queries, or the accuracy of a classification.
    """
    if not any(axis.kind == "teacher" for axis in axes):
        return "score"
    return "success10_text_to_image" if config.task.kind == "retrieval" else "top1"


def do_trial(sweep: Sweep, taken: Taken) -> Outcome:
    """Train and measure a trial that this worker has taken, and record its outcome.

    What a killed worker left of it is gone on with. Checkpoints are removed once nothing needs them; the students,
    the metrics and the reports of every seed stay.
    """
    earlier = read_outcome(sweep.out, taken.number)  # of a worker that was killed before it could tell the storage
    outcome = earlier or _repeated(sweep, taken) or _worked(sweep, taken)
    write_outcome(sweep.out, outcome)
    clear(trial_folder(sweep.out, taken.number))
    sweep.study.finish(outcome)
    return outcome


def clear_finished(sweep: Sweep) -> None:
    """Remove what workers that were killed right after a trial's end left of its checkpoints."""
    for outcome in read_outcomes(sweep.out):
        clear(trial_folder(sweep.out, outcome.number))


def clear(folder: Path) -> None:
    """Remove what a finished trial needs no more: its trainings' checkpoints and second copies of the students."""
    for training in folder.glob("seed-*/training"):
        for name in ("checkpoints", "best"):
            shutil.rmtree(training / name, ignore_errors=True)
        (training / "best.json").unlink(missing_ok=True)


def _repeated(sweep: Sweep, taken: Taken) -> Outcome | None:
    """The outcome of an earlier trial with the same values, which would only come out the same again."""
    for other in read_outcomes(sweep.out):
        if other.repeats is None and label(other.params) == label(taken.params):
            return Outcome(taken.number, other.state, taken.params, other.seeds, other.reason, repeats=other.number)
    return None


def _worked(sweep: Sweep, taken: Taken) -> Outcome:
    folder = trial_folder(sweep.out, taken.number)
    _log.info("trial %d: %s", taken.number, label(taken.params))
    results: list[SeedResult] = []
    try:
        config = trial_config(sweep.config, sweep.base, taken.params)
        for result in _seeds(sweep, taken, config, folder):
            results.append(result)
    except _Stopped as stop:
        return Outcome(taken.number, PRUNED, taken.params, (_unfinished(sweep, folder),), str(stop))
    except _REFUSALS as fault:
        if not isinstance(fault, _OWN):
            files.write_text(folder / "traceback.txt", traceback.format_exc())
        reason = str(fault) if isinstance(fault, _OWN) else f"{type(fault).__name__}: {fault}"
        _log.warning("trial %d failed: %s", taken.number, reason)
        return Outcome(taken.number, FAILED, taken.params, (*results, _unfinished(sweep, folder, results)), reason)
    return Outcome(taken.number, COMPLETE, taken.params, tuple(results))


def _seeds(sweep: Sweep, taken: Taken, config: RunConfig, folder: Path) -> Iterator[SeedResult]:
    cache = _shared_cache(sweep, config)
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"folder": str(cache)})})
    for place in range(sweep.config.sweep.seeds):
        seed = config.seed + place
        workspace = Workspace(config.model_copy(update={"seed": seed}), folder / f"seed-{seed}")
        # Only the first seed decides whether the trial is stopped: the others are trained for its interval. With a
        # budget of time the trials are not at the same step at the same share of their training.
        stops = place == 0 and sweep.config.sweep.prune and config.train.budget_minutes is None
        watch = _watch(sweep, taken, config) if stops else None
        yield _result(sweep, workspace, run(workspace, until="evaluate", on_log=watch))
        clear(workspace.folder.parent)


def _watch(sweep: Sweep, taken: Taken, config: RunConfig) -> Callable[[Mapping[str, Any]], None]:
    key, study = objective_key(sweep.config, sweep.axes), sweep.study

    def watch(line: Mapping[str, Any]) -> None:
        if not isinstance(line.get(key), float):
            return
        step = line["step"]
        study.report(taken.number, step, line[key])
        if step >= config.train.steps:
            return
        finished = [
            outcome for outcome in read_outcomes(sweep.out) if outcome.state == COMPLETE and outcome.repeats is None
        ]
        if len(finished) < sweep.config.sweep.startup:
            return
        curves = study.curves()
        others = [curves[one.number] for one in finished if comparable(sweep.axes, one.params, taken.params)]
        if lags(step, curves[taken.number], others):
            raise _Stopped(f"stopped after step {step} of {config.train.steps}: below the median of {len(others)}")

    return watch


def _shared_cache(sweep: Sweep, config: RunConfig) -> Path:
    """The teacher's embeddings for a trial: made once, for all trials whose teacher and rows are the same.

    All rows are embedded whatever ``data.fraction`` is, so that a share of them finds its rows there.
    """
    base, own = _cache_inputs(sweep.config), _cache_inputs(config)
    whole = config.model_copy(update={"data": config.data.model_copy(update={"fraction": 1.0})})
    if base == own:
        workspace = Workspace(whole, sweep.out)
    else:
        cache = config.cache.model_copy(update={"folder": None})
        folder = sweep.out / "teachers" / fingerprint.of_value(own)[:16]
        workspace = Workspace(whole.model_copy(update={"cache": cache}), folder)
    with locked(sweep.out / "cache.lock"):
        if not _is_stored(workspace):
            run(workspace, until="cache")
    return workspace.cache.resolve()


def _is_stored(workspace: Workspace) -> bool:
    """Whether the embeddings of every teacher that is run are there."""
    teacher = workspace.config.teacher
    live = [one for one in (teacher.members or (teacher,)) if one.embeddings is None]
    return all((workspace.cache_of(one) / manifest.NAME).exists() for one in live)


def _cache_inputs(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        section: getattr(config, section).model_dump(mode="json", exclude=others)
        for section, others in _NOT_STORED.items()
    }
    if config.train.mode != "cached":  # then only the measured sets are stored
        values["stored"] = evaluation_sets(config)
    return values


def _unfinished(sweep: Sweep, folder: Path, results: Sequence[SeedResult] = ()) -> SeedResult:
    """What a trial that did not end reached in the seed that it was at."""
    seed = sweep.config.seed + len(results)
    return _training_result(sweep, Workspace(sweep.config, folder / f"seed-{seed}"), seed)


def _training_result(sweep: Sweep, workspace: Workspace, seed: int) -> SeedResult:
    key, lines = objective_key(sweep.config, sweep.axes), read_metrics(workspace)
    scored = [line for line in lines if isinstance(line.get(key), float)]
    kept = max(scored, key=lambda line: (line["score"], -line["step"]), default=None)  # the student that is kept
    return SeedResult(
        seed=seed,
        objective=kept[key] if kept else None,
        best_step=kept["step"] if kept else None,
        curve=tuple((line["step"], line[key]) for line in scored),
        seconds=sum(line.get(part) or 0.0 for line in lines for part in ("data_seconds", "compute_seconds")),
    )


def _result(sweep: Sweep, workspace: Workspace, report: Mapping[str, Any]) -> SeedResult:
    found = _training_result(sweep, workspace, workspace.config.seed)
    if found.objective is None:
        raise DataError("the validation gave no score to compare trials by; see that data.val has rows")
    speeds = (report.get("speeds") or {}).get("student") or {}
    return SeedResult(
        seed=found.seed,
        objective=found.objective,
        best_step=found.best_step,
        curve=found.curve,
        seconds=found.seconds,
        parameters=report["sizes"]["student"]["parameters"],
        rows=((report["data"].get("sets") or {}).get("train") or {}).get("pictures"),
        picture_ms=_milliseconds(speeds.get("images_per_s")),
        text_ms=_milliseconds(speeds.get("texts_per_s")),
        sets=_measured(report),
    )


def _milliseconds(rate: float | None) -> float | None:
    return 1000 / rate if rate else None


def _measured(report: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    sets: dict[str, dict[str, float | None]] = {}
    rows = (report.get("evaluation") or {}).get("rows") or []
    # A text tower alone has no pictures of its own to be measured against.
    pairing = "student" if any(row["pairing"] == "student" for row in rows) else "student_query_teacher_index"
    for row in rows:
        kind = (row["pairing"], row["search"], row["direction"], row["k"])
        if kind == (pairing, "exact", "text_to_image", 10) and row["measure"] in _MEASURES:
            sets.setdefault(row["set"], {})[f"{row['measure']}10"] = row["value"]
    return sets
