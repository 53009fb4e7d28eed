"""The configuration of a sweep."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from clipdistill.config.base import Count, Positive, Section


class RangeConfig(Section):
    """An axis between two numbers."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    """The distance of a grid's points; none = the axis is continuous, or whole numbers where both ends are."""


Axis = RangeConfig | Annotated[tuple[Any, ...], Field(min_length=1)]


class SweepConfig(Section):
    """Trials of one run with some keys changed."""

    axes: dict[str, Axis] = Field(default_factory=dict)
    """By dotted key of the configuration: a list of values, or {low, high, log}: {"train.lr" = {low = 1e-4, high =
    1e-2, log = true}}."""
    sampler: Literal["grid", "random", "tpe"] = "tpe"
    trials: Positive = 20
    seeds: Positive = 1
    """How many seeds each trial is trained with; the intervals come from them."""
    prune: bool = True
    """Whether a trial whose validation overlap lags behind the others' at the same step is stopped early."""
    storage: str | None = None
    """``sqlite:///FILE`` or ``journal:FILE``; none = an SQLite file in the sweep's folder. Workers share it."""
    startup: Count = 5
    """Trials before the first is pruned, and before TPE begins to choose."""
