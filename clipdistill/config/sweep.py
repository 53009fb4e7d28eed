"""The configuration of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from clipdistill.config.base import Count, Positive, Section

Number = Annotated[float, Field(allow_inf_nan=False)]


class RangeConfig(Section):
    """An axis between two numbers."""

    low: Number
    high: Number
    log: bool = False
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The distance of the axis's points, which a grid needs; none = the axis is continuous, or all whole numbers where
    the key takes no others."""

    @model_validator(mode="after")
    def _consistent(self) -> RangeConfig:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 where log = true, got {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("give either log or step")
        return self

    def points(self) -> tuple[float, ...]:
        """The values ``low, low + step, ...`` up to ``high``; none where the axis has no ``step``."""
        if self.step is None:
            return ()
        # Counted, not summed: 0.1 + 0.1 + 0.1 is not 0.3, and a sum could miss the last one.
        count = math.floor((self.high - self.low) / self.step * (1 + 1e-12)) + 1
        return tuple(round(self.low + place * self.step, 12) for place in range(count))


def _flat(axes: Any) -> Any:
    """Let ``loss.temperature = [...]``, which TOML reads as a table in a table, stand for ``"loss.temperature"``."""
    return dict(_leaves(axes, "")) if isinstance(axes, Mapping) else axes


def _leaves(axes: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in axes.items():
        if isinstance(value, Mapping) and value and not set(RangeConfig.model_fields) & set(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tuple(value) if isinstance(value, list) else value


def _kind(axis: Any) -> str:
    return "range" if isinstance(axis, Mapping | RangeConfig) else "list"


Axis = Annotated[
    Annotated[RangeConfig, Tag("range")] | Annotated[tuple[Any, ...], Field(min_length=1), Tag("list")],
    Discriminator(_kind),
]


class SweepConfig(Section):
    """Trials of one run with some keys changed."""

    axes: Annotated[dict[str, Axis], BeforeValidator(_flat)] = Field(default_factory=dict)
    """By dotted key of the configuration: a list of values, or {low, high, log}: {"train.lr" = {low = 1e-4, high =
    1e-2, log = true}}. A section's own name takes tables, which are merged into it: {student = [{image = "nano", text =
    "nano"}, {image = "tiny", text = "tiny"}]}."""
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
