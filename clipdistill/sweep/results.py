"""A sweep's results: one JSON value that the page and the terminal are made from."""

from __future__ import annotations

from typing import Any

from clipdistill.core import manifest
from clipdistill.sweep.outcome import Outcome, read_outcomes
from clipdistill.sweep.trial import Sweep, objective_key

SCHEMA = "clipdistill.sweep/1"


def sweep_results(sweep: Sweep) -> dict[str, Any]:
    """Everything that a sweep measured.

    Args:
        sweep: The sweep, whose trials are finished.
    """
    outcomes = read_outcomes(sweep.out)
    settings = sweep.config.sweep
    return {
        "schema": SCHEMA,
        "name": sweep.config.name,
        "seed": sweep.config.seed,
        "sampler": settings.sampler,
        "seeds": settings.seeds,
        "objective": objective_key(sweep.axes),
        "axes": [{"key": axis.key, "kind": axis.kind, "values": list(axis.values)} for axis in sweep.axes],
        "trials": [trial_values(outcome) for outcome in outcomes],
        "libraries": manifest.libraries(),
    }


def trial_values(outcome: Outcome) -> dict[str, Any]:
    """A trial as plain values, with its objective."""
    return {**outcome.to_json(), "objective": outcome.objective}
