"""A time instead of steps: what a step and an evaluation take is measured, and as many as fit are planned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from clipdistill.config import TrainConfig
from clipdistill.core.errors import ConfigError
from clipdistill.core.progress import duration
from clipdistill.training.batch import Batch

CALIBRATION_STEPS = 32
"""A measurement has at most so many steps, the first of which only warms up."""
_LEAST_STEPS, _SECONDS = 3, 5.0
_SHARE = 0.1  # of the budget at most, once a step is measured
_EVALUATIONS = 0.25  # of the budget at most, but one evaluation there always is


@dataclass(frozen=True, slots=True)
class Cost:
    """What was measured.

    Attributes:
        step_seconds: A training step with its data.
        evaluation_seconds: An evaluation, and writing the checkpoint and the student that follow it.
        spent_seconds: What the measurement itself took of the budget.
    """

    step_seconds: float
    evaluation_seconds: float
    spent_seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a budget buys. A resumed run follows the plan that it began with.

    Attributes:
        budget_minutes: The budget.
        steps: How many steps fit.
        warmup: The configured warm-up, in proportion.
        eval_every: Steps between evaluations: as many of them as configured, or fewer where they are dear.
        save_every: Steps between checkpoints, in proportion.
        step_seconds: As measured.
        evaluation_seconds: As measured.
        planned_seconds: What it should take in all, the measurement included.
        taken_seconds: What it has taken so far, over all its processes.
    """

    budget_minutes: float
    steps: int
    warmup: int
    eval_every: int
    save_every: int
    step_seconds: float
    evaluation_seconds: float
    planned_seconds: float
    taken_seconds: float = 0.0

    def settings(self, train: TrainConfig) -> TrainConfig:
        """The loop's settings with the plan's numbers in their places."""
        names = ("steps", "warmup", "eval_every", "save_every")
        return train.model_copy(update={name: getattr(self, name) for name in names})


def measure(
    batches: Iterator[Batch], step: Callable[[Batch], object], evaluate: Callable[[], object], budget_seconds: float
) -> Cost:
    """Take a few steps and one evaluation, and time them.

    Args:
        batches: At least two, such as those of the first steps.
        step: Takes a step.
        evaluate: Does what follows each ``eval_every`` steps.
        budget_seconds: A small share of it is spent here, though two steps and an evaluation are made in any case.
    """
    began = time.perf_counter()
    step(next(batches))  # the first one allocates, compiles and starts the workers
    warm = time.perf_counter()
    taken = 0
    for batch in batches:
        step(batch)
        taken += 1
        elapsed = time.perf_counter() - warm
        if (taken >= _LEAST_STEPS and elapsed > _SECONDS) or elapsed > _SHARE * budget_seconds:
            break
    stepped = time.perf_counter()
    evaluate()
    ended = time.perf_counter()
    return Cost((stepped - warm) / taken, ended - stepped, ended - began)


def plan_steps(train: TrainConfig, cost: Cost) -> Plan:
    """Choose the steps whose training and evaluations fit ``train.budget_minutes``.

    ``train.steps`` is then no bound, but what ``warmup``, ``eval_every`` and ``save_every`` are in proportion to.

    Args:
        train: The loop's settings.
        cost: What a step and an evaluation take.

    Raises:
        ConfigError: If the budget is too small for one step and one evaluation, naming both times.
    """
    minutes = train.budget_minutes or 0.0
    left = 60 * minutes - cost.spent_seconds
    if left < cost.step_seconds + cost.evaluation_seconds:
        least = cost.spent_seconds + cost.step_seconds + cost.evaluation_seconds
        raise ConfigError(
            f"train.budget_minutes: {minutes:g} ({60 * minutes:.1f} s) is too little: measuring took "
            f"{cost.spent_seconds:.1f} s, one step takes {cost.step_seconds:.2f} s and one evaluation "
            f"{cost.evaluation_seconds:.2f} s; give at least {least / 60:.2g}"
        )
    wanted = -(-train.steps // train.eval_every)
    fitting = _EVALUATIONS * left / max(cost.evaluation_seconds, 1e-9)
    evaluations = max(1, min(wanted, math.floor(min(fitting, wanted))))
    steps = max(1, math.floor((left - evaluations * cost.evaluation_seconds) / max(cost.step_seconds, 1e-9)))
    eval_every = -(-steps // evaluations)
    share = steps / train.steps
    return Plan(
        budget_minutes=minutes,
        steps=steps,
        warmup=min(steps - 1, round(share * train.warmup)),
        eval_every=eval_every,
        save_every=max(1, round(share * train.save_every)),
        step_seconds=cost.step_seconds,
        evaluation_seconds=cost.evaluation_seconds,
        planned_seconds=cost.spent_seconds
        + steps * cost.step_seconds
        - (-steps // eval_every) * cost.evaluation_seconds,
        taken_seconds=cost.spent_seconds,
    )


def in_words(plan: Plan) -> str:
    """The plan in a line, for the log."""
    evaluations = -(-plan.steps // plan.eval_every)
    return (
        f"{duration(60 * plan.budget_minutes)} are enough for {plan.steps} x {plan.step_seconds:.3g} s of training and "
        f"{evaluations} x {plan.evaluation_seconds:.3g} s of evaluation (warmup {plan.warmup}, eval_every "
        f"{plan.eval_every}); planned: {duration(plan.planned_seconds)}"
    )
