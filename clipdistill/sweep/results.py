"""A sweep's results: one JSON value that the page and the terminal are made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from clipdistill.config import RunConfig
from clipdistill.core import manifest
from clipdistill.stages.train import loss_weights
from clipdistill.sweep.axes import Axis, label
from clipdistill.sweep.effects import Effect, Effects, analyse
from clipdistill.sweep.findings import findings, mean_measure, weights_trade_off
from clipdistill.sweep.front import pareto_front
from clipdistill.sweep.law import LearningCurve, fit_curve
from clipdistill.sweep.outcome import COMPLETE, Outcome

SCHEMA = "clipdistill.sweep/1"
FRACTION = "data.fraction"
_COSTS = ("parameters", "picture_ms", "text_ms")


def sweep_results(
    config: RunConfig, axes: Sequence[Axis], objective: str, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Everything that a sweep measured, and what follows from it.

    Args:
        config: The sweep's configuration.
        axes: Its axes.
        objective: The name of the validation's value that was maximised.
        outcomes: Its finished trials.
    """
    # A repeated trial is no further evidence, and one that was stopped did not show what it would have reached.
    complete = [outcome for outcome in outcomes if outcome.state == COMPLETE and outcome.repeats is None]
    effects, curve = analyse(axes, complete), None
    if any(axis.key == FRACTION for axis in axes):
        curve = learning_curve(complete, effects)
    bases = {axis.key: base for axis in axes if (base := base_value(config, axis)) is not None}
    trade_off = weights_trade_off(complete, effects, [axis.key for axis in axes if axis.key.startswith("loss")])
    return {
        "schema": SCHEMA,
        "name": config.name,
        "seed": config.seed,
        "sampler": config.sweep.sampler,
        "seeds": config.sweep.seeds,
        "objective": objective,
        "task": config.task.kind,
        "axes": [_axis(axis, bases) for axis in axes],
        "trials": [_trial(outcome) for outcome in outcomes],
        "spread": dataclasses.asdict(effects.spread) if effects.spread else None,
        "effects": [_effect(effect) for effect in effects.effects],
        "fronts": _fronts(complete) if any(axis.kind == "capacity" for axis in axes) else {},
        "learning_curve": dataclasses.asdict(curve) | {"formula": curve.law.formula} if curve else None,
        "findings": [dataclasses.asdict(one) for one in findings(effects, curve, bases, outcomes, trade_off)],
        "libraries": manifest.libraries(),
    }


def base_value(config: RunConfig, axis: Axis) -> Any:
    """The configuration's own value of an axis; a preset's where a loss's is not given; None where there is none."""
    values: Any = config.model_dump(mode="json")
    for part in axis.key.split("."):
        values = values[part]
    if values is None and axis.key.startswith("loss."):
        values = getattr(loss_weights(config.loss), axis.key.removeprefix("loss."), None)
    if isinstance(values, Mapping) and axis.values:
        return next((value for value in axis.values if _is_within(value, values)), None)
    # 1 and 1.0 are one value, whichever way the axis writes it
    same = (value for value in axis.values if value == values and isinstance(value, bool) == isinstance(values, bool))
    return next(same, values)


def _is_within(table: Any, section: Mapping[str, Any]) -> bool:
    """Whether a table changes nothing when it is merged into a section."""
    if not isinstance(table, Mapping):
        return False
    return all(
        _is_within(value, section[key])
        if isinstance(section.get(key), Mapping)
        else label(section.get(key)) == label(value)
        for key, value in table.items()
    )


def learning_curve(outcomes: Sequence[Outcome], effects: Effects) -> LearningCurve | None:
    """The law through the best trial at each amount of training rows; None with too few amounts."""
    best: dict[int, float] = {}
    for outcome in outcomes:
        rows = outcome.seeds[0].rows
        if rows is not None and outcome.objective is not None:
            best[rows] = max(outcome.objective, best.get(rows, 0.0))
    amounts = sorted(best)
    deviation = effects.spread.deviation if effects.spread else None
    return fit_curve(amounts, [best[rows] for rows in amounts], deviation)


def _axis(axis: Axis, bases: Mapping[str, Any]) -> dict[str, Any]:
    return {**dataclasses.asdict(axis), "kind": axis.kind, "base": bases.get(axis.key)}


def _trial(outcome: Outcome) -> dict[str, Any]:
    """A trial with its means over the seeds."""
    reached = [seed.objective for seed in outcome.seeds if seed.objective is not None]
    means = {name: _mean([getattr(seed, name) for seed in outcome.seeds]) for name in (*_COSTS, "seconds", "rows")}
    return {
        **outcome.to_json(),
        "objective": outcome.objective,
        "interval": [min(reached), max(reached)] if len(reached) > 1 else None,
        "means": means,
        "success10": mean_measure(outcome, "success10"),
        "overlap10": mean_measure(outcome, "overlap10"),
        "retention10": mean_measure(outcome, "retention10"),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _effect(effect: Effect) -> dict[str, Any]:
    return {
        "key": effect.axis.key,
        "kind": effect.axis.kind,
        "importance": effect.importance,
        "matters": effect.matters,
        "levels": [dataclasses.asdict(level) for level in effect.levels],
    }


def _fronts(outcomes: Sequence[Outcome]) -> dict[str, list[int]]:
    """The numbers of the trials on each Pareto front, by what it costs."""
    fronts = {}
    for name in _COSTS:
        points = [(_mean([getattr(seed, name) for seed in outcome.seeds]), outcome) for outcome in outcomes]
        known = [
            (cost, one.objective, one.number) for cost, one in points if cost is not None and one.objective is not None
        ]
        places = pareto_front([cost for cost, _, _ in known], [gain for _, gain, _ in known])
        fronts[name] = [known[place][2] for place in places]
    return fronts
