"""The page of a sweep: one HTML file that holds everything it shows, made from ``sweep.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipdistill.core import files
from clipdistill.core.errors import MismatchError
from clipdistill.report import tables
from clipdistill.report.html import environment, only_allowed
from clipdistill.report.panel import Drawing
from clipdistill.report.sweep_figures import (
    COSTS,
    axis_figure,
    cost_figure,
    importance_figure,
    learning_figure,
    short,
    trade_off_figure,
    training_figure,
)

SCHEMA = "clipdistill.sweep/1"
_TEMPLATE = "sweep.html.j2"
_ORDER = ("complete", "pruned", "failed")
OBJECTIVES: Mapping[tuple[str, str], str] = {
    (
        "retrieval",
        "score",
    ): "overlap@10 with the teacher's own ranking on the validation set, the mean of both directions",
    ("retrieval", "success10_text_to_image"): "success@10 of the validation set's text queries, as the teachers differ",
    ("classification", "score"): "agreement with the teacher's classes on the validation set",
    ("classification", "top1"): "top-1 accuracy on the validation set, as the teachers differ",
}


def write_sweep_report(path: Path, results: Mapping[str, Any]) -> None:
    """Write a sweep's page: the same results give the same bytes.

    Args:
        path: The HTML file.
        results: The sweep's results, schema ``clipdistill.sweep/1``.

    Raises:
        MismatchError: If the results are of another schema.
    """
    files.write_text(path, render_sweep(results))


def render_sweep(results: Mapping[str, Any]) -> str:
    """The page that :func:`write_sweep_report` writes, as text."""
    if results.get("schema") != SCHEMA:
        raise MismatchError("the sweep's results", "schema", SCHEMA, results.get("schema"), "Run the sweep again.")
    trials = sorted(results["trials"], key=lambda trial: (_ORDER.index(trial["state"]), -(trial["objective"] or 0)))
    complete = [trial for trial in trials if trial["state"] == "complete" and trial["repeats"] is None]
    template_environment = environment()
    template_environment.filters.update(short=short, milli=_milliseconds, millions=tables.millions)
    page = template_environment.get_template(_TEMPLATE).render(
        results=results,
        trials=trials,
        best=complete[0] if complete else None,
        keys=[axis["key"] for axis in results["axes"]],
        counts={state: sum(trial["state"] == state for trial in trials) for state in _ORDER},
        objective=OBJECTIVES[results["task"], results["objective"]],
        settings=_settings(results, complete),
        capacity=_capacity(results, complete),
        learning=learning_figure(results["learning_curve"]) if results["learning_curve"] else None,
        trade_off=trade_off_figure(complete, [a["key"] for a in results["axes"] if a["key"].startswith("loss")]),
        importance=importance_figure(results["effects"]) if results["spread"] else None,
        training=training_figure(trials),
    )
    return only_allowed(page)


def _settings(results: Mapping[str, Any], complete: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """A figure for each axis, but for the share of the data, which has its own."""
    bases = {axis["key"]: axis["base"] for axis in results["axes"]}
    return [
        axis_figure(effect, bases[effect["key"]], complete) for effect in results["effects"] if effect["kind"] != "data"
    ]


def _capacity(results: Mapping[str, Any], complete: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """The objective against each cost, where an axis changes the student."""
    fronts = results["fronts"]
    found = (cost_figure(cost, complete, fronts[cost]) for cost in COSTS if cost in fronts)
    return [figure for figure in found if figure is not None]


def _milliseconds(value: float | None) -> str:
    return tables.amount(value)
