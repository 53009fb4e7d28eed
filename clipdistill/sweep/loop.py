"""A worker of a sweep: it takes trials until as many as asked for are finished, and writes what they came to."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipdistill.config import RunConfig, known_sets
from clipdistill.core import files
from clipdistill.core.errors import ConfigError
from clipdistill.core.locks import locked
from clipdistill.report.sweep import write_sweep_report
from clipdistill.sweep.axes import check_values, label, read_axes
from clipdistill.sweep.outcome import COMPLETE, FAILED, PRUNED, read_outcomes
from clipdistill.sweep.results import sweep_results
from clipdistill.sweep.study import Study
from clipdistill.sweep.trial import Sweep, clear_finished, do_trial, objective_key

_log = logging.getLogger("clipdistill")
_LOOK_AGAIN = 1.0
"""Seconds between two looks at what the other workers do."""


def run_sweep(config: RunConfig, out: Path, base: Path) -> dict[str, Any]:
    """Do a sweep's trials together with whatever other workers were started on the same folder.

    A worker with nothing left to take waits for the others, so that it can take up what one that dies leaves behind;
    so every worker ends with the whole sweep's results.

    Args:
        config: The configuration, with its ``sweep`` section.
        out: The sweep's folder: ``trials/NNNN/seed-S`` are runs like any other.
        base: Where relative paths among the axes' values start: the configuration file's folder.

    Returns:
        The results as plain values, schema ``clipdistill.sweep/1``, as written to ``sweep.json``, which
        ``sweep.html`` is made from.

    Raises:
        ConfigError: If an axis or one of its values is refused, or there is no validation set to compare trials on.
        MissingExtraError: If Optuna is not installed.
        MismatchError: If the folder or the storage holds a sweep of another configuration.
    """
    axes = read_axes(config.sweep)
    if "val" not in known_sets(config):
        raise ConfigError("data.val: a sweep compares its trials on a validation set: give data.val or data.hold_out")
    check_values(config, base, axes)
    out.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(config, axes, out, base, Study(config, axes, out, base))
    _work(sweep)
    with locked(out / "sweep.lock"):
        results = sweep_results(config, axes, objective_key(config, axes), read_outcomes(out))
        files.write_json(out / "sweep.json", results)
        write_sweep_report(out / "sweep.html", results)
    return results


def _work(sweep: Sweep) -> None:
    study = sweep.study
    while True:
        taken = study.take()
        if taken is not None:
            try:
                outcome = do_trial(sweep, taken)
            finally:
                taken.lock.release()
            done = study.progress()
            reached = "" if outcome.objective is None else f", {outcome.objective:.4f}"
            _log.info("trial %d: %s%s (%d of %d)", taken.number, outcome.state, reached, done.finished, done.budget)
        elif study.progress().running:
            time.sleep(_LOOK_AGAIN)
        else:
            clear_finished(sweep)
            return


def sweep_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """A sweep in words: its trials, the best first, why some failed, and what was found.

    Args:
        results: What :func:`run_sweep` returns.
    """
    trials = results["trials"]
    counts = Counter(trial["state"] for trial in trials)
    yield f"{len(trials)} trials: {', '.join(f'{counts[state]} {state}' for state in (COMPLETE, PRUNED, FAILED))}"
    complete = [trial for trial in trials if trial["state"] == COMPLETE]
    for trial in sorted(complete, key=lambda trial: (-trial["objective"], trial["number"])):
        values = ", ".join(f"{key} = {label(value)}" for key, value in trial["params"].items())
        yield f"  {trial['objective']:.4f}  trial {trial['number']}: {values}"
    for trial in trials:
        if trial["state"] == FAILED:
            yield f"  failed  trial {trial['number']}: {trial['reason'].splitlines()[0]}"
    yield "found:"
    yield from (f"  {finding['text']}" for finding in results["findings"])
