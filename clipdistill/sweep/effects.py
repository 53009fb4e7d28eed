"""What each axis does to the objective: an additive model over the trials, and what of it is more than chance.

A trial's objective is taken as a sum of one part for each axis. A list's values have a part each; a range's part is a
parabola over the value, or over its logarithm. The parts are fitted by least squares, so that trials that a sampler
has chosen unevenly still compare like with like. In a full grid this is the analysis of variance.

Differences count where they are beyond a simultaneous 95% interval: the interval is widened for as many values as an
axis has, by simulating the largest of their t statistics (Dunnett 1955, Tukey 1949), so that the best of many values
is not taken for a discovery.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdistill.sweep.axes import Axis, label
from clipdistill.sweep.outcome import Outcome

Floats = npt.NDArray[np.float64]
LEAST_FREEDOM = 2
"""A spread that fewer degrees of freedom than these stand for is no spread."""
_LEVEL = 0.95
_DRAWS = 4000
_RANGE_POINTS = 9
_ROUNDING = 1e-9
_LEAST_FOR_PARABOLA = 5


@dataclass(frozen=True, slots=True)
class Spread:
    """How far the objective of a trial moves by chance.

    Attributes:
        deviation: The standard deviation of a trial's objective, the mean over its seeds.
        freedom: The degrees of freedom that it was found with.
        source: ``seeds``: from the seeds of the same trials; ``trials``: from what the axes together leave unexplained.
    """

    deviation: float
    freedom: int
    source: str


@dataclass(frozen=True, slots=True)
class Level:
    """One value of an axis.

    Attributes:
        value: The value.
        objective: What a trial with it reaches, the other axes as they are on average.
        low: The lower end of its 95% interval; None where the spread is not known.
        high: The upper end.
        trials: How many complete trials have it.
        parameters: Of their students, on average; None where that is not known.
    """

    value: Any
    objective: float
    low: float | None
    high: float | None
    trials: int
    parameters: float | None


@dataclass(frozen=True, slots=True)
class Contrast:
    """The difference between two values of an axis.

    Attributes:
        gain: How much more the first reaches than the second.
        low: The lower end of its simultaneous 95% interval.
        high: The upper end.
    """

    gain: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Effect:
    """What one axis does.

    Attributes:
        axis: The axis.
        levels: Its values in the axis's order; for a range some points of it.
        importance: The share of the differences between trials that it explains, less what chance would.
        contrasts: By the places of two levels, the first minus the second; empty where the spread is not known.
    """

    axis: Axis
    levels: tuple[Level, ...]
    importance: float
    contrasts: dict[tuple[int, int], Contrast]

    @property
    def matters(self) -> bool:
        """Whether any two of its values differ beyond chance."""
        return any(contrast.is_real for contrast in self.contrasts.values())

    @property
    def best(self) -> int:
        """The place of the best level."""
        return max(range(len(self.levels)), key=lambda place: self.levels[place].objective)


@dataclass(frozen=True, slots=True)
class Effects:
    """All axes' effects.

    Attributes:
        spread: What chance does; None where it is not known.
        effects: One an axis that took two values or more; empty where the trials are too few to tell the axes apart.
    """

    spread: Spread | None
    effects: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class _Design:
    """The additive model's matrix: a row a trial; for each axis its columns, and a row for each of its levels."""

    matrix: Floats
    columns: dict[str, slice]
    levels: dict[str, tuple[list[Any], Floats]]


def analyse(axes: Sequence[Axis], outcomes: Sequence[Outcome]) -> Effects:
    """Fit the additive model to complete trials.

    Args:
        axes: The sweep's axes.
        outcomes: Complete trials, each with its own values.
    """
    if len(outcomes) < 2:
        return Effects(None, ())
    values = np.array([outcome.objective for outcome in outcomes], np.float64)
    design = _design([axis for axis in axes if _taken(axis, outcomes) > 1], outcomes)
    columns, freedom = design.matrix.shape[1], len(outcomes) - design.matrix.shape[1]
    if np.linalg.matrix_rank(design.matrix) < columns:  # some axes changed only together
        return Effects(_larger(_seed_spread(outcomes), None), ())
    rest = _rest(design.matrix, values)
    left = Spread(math.sqrt(rest / freedom), freedom, "trials") if freedom else None
    spread = _larger(_seed_spread(outcomes), left)
    variance = rest / freedom if freedom else spread.deviation**2 if spread else 0.0
    effects = [_effect(axis, design, values, spread, variance, outcomes) for axis in axes if axis.key in design.columns]
    return Effects(spread, tuple(effects))


def _taken(axis: Axis, outcomes: Sequence[Outcome]) -> int:
    return len({label(outcome.params[axis.key]) for outcome in outcomes})


def _larger(first: Spread | None, second: Spread | None) -> Spread | None:
    """The larger of two spreads that enough stands for: what the axes leave unexplained may be more than the seeds'."""
    known = [one for one in (first, second) if one is not None and one.freedom >= LEAST_FREEDOM]
    return max(known, key=lambda one: one.deviation, default=None)


def _seed_spread(outcomes: Sequence[Outcome]) -> Spread | None:
    """Of a trial's mean over its seeds, without what a seed does to all trials alike."""
    table = np.array([[seed.objective for seed in outcome.seeds] for outcome in outcomes], np.float64)
    trials, seeds = table.shape
    if seeds < 2:
        return None
    left = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    freedom = (trials - 1) * (seeds - 1)
    return Spread(math.sqrt(float((left**2).sum()) / freedom / seeds), freedom, "seeds")


def _design(axes: Sequence[Axis], outcomes: Sequence[Outcome]) -> _Design:
    blocks, columns, levels, start = [np.ones((len(outcomes), 1))], {}, {}, 1
    for axis in axes:
        block, names, rows = _block(axis, [outcome.params[axis.key] for outcome in outcomes])
        columns[axis.key] = slice(start, start + block.shape[1])
        levels[axis.key] = (names, rows)
        blocks.append(block)
        start += block.shape[1]
    return _Design(np.hstack(blocks), columns, levels)


def _block(axis: Axis, values: list[Any]) -> tuple[Floats, list[Any], Floats]:
    """An axis's columns for the trials, and its levels with their rows; the columns' means over the trials are 0."""
    if axis.values:
        names = [value for value in axis.values if label(value) in {label(found) for found in values}]
        labels = [label(name) for name in names]
        rows = np.vstack([np.zeros(len(names) - 1), np.eye(len(names) - 1)])
        block = rows[[labels.index(label(value)) for value in values]]
    else:
        names = _points(axis, values)
        degree = 2 if len(set(values)) >= _LEAST_FOR_PARABOLA else 1
        block, rows = _powers(axis, values, degree), _powers(axis, names, degree)
    mean = block.mean(0)
    return block - mean, names, rows - mean


def _points(axis: Axis, values: list[Any]) -> list[float]:
    """Points of a range that lie between the values that were tried."""
    low, high = float(min(values)), float(max(values))
    if axis.log:
        return [float(point) for point in np.geomspace(low, high, _RANGE_POINTS)]
    return [float(point) for point in np.linspace(low, high, _RANGE_POINTS)]


def _powers(axis: Axis, values: Sequence[float], degree: int) -> Floats:
    low, high, at = axis.low, axis.high, np.array(values, np.float64)
    if axis.log:
        low, high, at = math.log(low), math.log(high), np.log(at)
    scaled = 2 * (at - low) / (high - low) - 1
    return np.stack([scaled**power for power in range(1, degree + 1)], 1)


def _rest(matrix: Floats, values: Floats) -> float:
    """The squares that a least-squares fit leaves."""
    return float(((values - matrix @ _fit(matrix, values)) ** 2).sum())


def _fit(matrix: Floats, values: Floats) -> Floats:
    return np.asarray(np.linalg.lstsq(matrix, values, rcond=None)[0], np.float64)


def _effect(
    axis: Axis, design: _Design, values: Floats, spread: Spread | None, variance: float, outcomes: Sequence[Outcome]
) -> Effect:
    at, (names, rows) = design.columns[axis.key], design.levels[axis.key]
    found = _fit(design.matrix, values)
    covariance = np.asarray(np.linalg.inv(design.matrix.T @ design.matrix), np.float64)
    whole = np.zeros((len(names), design.matrix.shape[1]))
    whole[:, 0], whole[:, at] = 1, rows
    objectives = whole @ found
    half = np.full(len(names), np.nan)
    if spread is not None:
        errors = np.sqrt(np.einsum("ij,jk,ik->i", whole, covariance, whole)) * spread.deviation
        half = errors * _critical(np.ones((1, 1)), spread.freedom)
    levels = tuple(
        Level(
            name,
            float(reached),
            None if np.isnan(width) else float(reached - width),
            None if np.isnan(width) else float(reached + width),
            *_members(axis, name, outcomes),
        )
        for name, reached, width in zip(names, objectives, half, strict=True)
    )
    importance = _importance(design, at, values, variance)
    return Effect(axis, levels, importance, _contrasts(rows, found[at], covariance[at, at], spread))


def _members(axis: Axis, name: Any, outcomes: Sequence[Outcome]) -> tuple[int, float | None]:
    inside = [outcome for outcome in outcomes if label(outcome.params[axis.key]) == label(name)]
    sizes = [seed.parameters for outcome in inside for seed in outcome.seeds if seed.parameters is not None]
    return len(inside), sum(sizes) / len(sizes) if sizes else None


def _importance(design: _Design, at: slice, values: Floats, variance: float) -> float:
    """Epsilon squared: the axis's share of all squares, less the share that as many columns explain by chance."""
    total = float(((values - values.mean()) ** 2).sum())
    own = _rest(np.delete(design.matrix, at, axis=1), values) - _rest(design.matrix, values)
    by_chance = (at.stop - at.start) * variance
    return max(0.0, (own - by_chance) / total) if total > 0 else 0.0


def _contrasts(
    rows: Floats, found: Floats, covariance: Floats, spread: Spread | None
) -> dict[tuple[int, int], Contrast]:
    if spread is None:
        return {}
    pairs = list(itertools.permutations(range(len(rows)), 2))
    differences = np.array([rows[first] - rows[second] for first, second in pairs])
    errors = np.sqrt(np.maximum(0, np.einsum("ij,jk,ik->i", differences, covariance, differences)))
    reach = _critical(_correlation(differences, covariance, errors), spread.freedom) * errors * spread.deviation
    reach = np.maximum(reach, _ROUNDING)  # trials that are all alike leave a spread of 0
    gains = differences @ found
    return {
        pair: Contrast(float(gain), float(gain - half), float(gain + half))
        for pair, gain, half in zip(pairs, gains, reach, strict=True)
    }


def _correlation(differences: Floats, covariance: Floats, errors: Floats) -> Floats:
    scaled = differences / np.maximum(errors, 1e-300)[:, None]
    return np.asarray(scaled @ np.linalg.cholesky(covariance))


def _critical(factors: Floats, freedom: int) -> float:
    """What the largest of several t statistics stays below in 95 of 100 cases.

    Args:
        factors: ``[statistics, normals]``: each statistic as a unit sum of independent normals.
        freedom: Of the spread that divides them all.
    """
    random = np.random.default_rng(0)
    normals = random.standard_normal((_DRAWS, factors.shape[1]))
    scale = np.sqrt(random.chisquare(freedom, _DRAWS) / freedom)
    return float(np.quantile(np.abs(normals @ factors.T).max(1) / scale, _LEVEL))
