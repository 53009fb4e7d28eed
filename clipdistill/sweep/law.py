"""The learning curve: a power law through what is lost at each amount of data, and what twice the data would bring.

Error falls as a power of the number of examples (Hestness et al. 2017, "Deep Learning Scaling is Predictable,
Empirically"): ``1 - overlap = a + b n^-c`` with a floor ``a``, or without one where the points are too few for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LEAST, LEAST_WITH_FLOOR = 3, 5
_EXPONENTS = np.array([0.0, *np.geomspace(0.001, 4, 320)])
# 0 stands for data that do not help. With a floor it is the floor that says so.
_DRAWS = 400


@dataclass(frozen=True, slots=True)
class Law:
    """``error = floor + factor * n ** -exponent``.

    Attributes:
        floor: What no amount of data takes away; 0 where it was not fitted.
        factor: The error above the floor at one row.
        exponent: How fast it falls.
        has_floor: Whether the floor was fitted.
    """

    floor: float
    factor: float
    exponent: float
    has_floor: bool

    def error(self, rows: float) -> float:
        """The error with so many rows."""
        return float(self.floor + self.factor * rows**-self.exponent)

    @property
    def formula(self) -> str:
        """The fitted law as text."""
        power = f"{self.factor:.3g} n^-{self.exponent:.2g}"
        return f"{self.floor:.3g} + {power}" if self.has_floor else power


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """A fitted learning curve.

    Attributes:
        rows: The amounts of data, rising.
        reached: The objective at each.
        law: The law through ``1 - reached``.
        gain: What the law says twice the largest amount would bring.
        low: The lower end of the gain's 95% interval; None where the spread is not known.
        high: The upper end.
    """

    rows: tuple[int, ...]
    reached: tuple[float, ...]
    law: Law
    gain: float
    low: float | None
    high: float | None


def fit_curve(rows: Sequence[int], reached: Sequence[float], deviation: float | None) -> LearningCurve | None:
    """Fit the law to what was reached with different amounts of data.

    Args:
        rows: The amounts, rising, each once.
        reached: The objective at each, up to 1.
        deviation: The standard deviation of each by chance; None where it is not known. The interval comes from
            fitting again what the law says with this much noise (a parametric bootstrap, 400 times).

    Returns:
        The curve; None with fewer than three amounts, which any power law could be drawn through.
    """
    if len(rows) < LEAST:
        return None
    counts, errors = np.array(rows, np.float64), 1 - np.array(reached, np.float64)
    law = fit_law(counts, errors)
    most = float(counts[-1])
    low = high = None
    if deviation is not None:
        noise = np.random.default_rng(0).normal(0, deviation, (_DRAWS, len(rows)))
        fitted = np.array([law.error(count) for count in counts])
        gains = [_gain(fit_law(counts, fitted + one), most) for one in noise]
        low, high = (float(end) for end in np.quantile(gains, (0.025, 0.975)))
    return LearningCurve(tuple(rows), tuple(reached), law, _gain(law, most), low, high)


def _gain(law: Law, rows: float) -> float:
    return law.error(rows) - law.error(2 * rows)


def fit_law(rows: Floats, errors: Floats) -> Law:
    """The least-squares law, with a floor from five points on; neither floor nor factor is below 0.

    For each of many exponents the other two are a linear fit, so the best of all is found whatever the points.
    """
    has_floor = len(rows) >= LEAST_WITH_FLOOR
    scale = float(rows.max())  # so that both columns are of the same size
    exponents = _EXPONENTS[1:] if has_floor else _EXPONENTS
    powers = (rows[None] / scale) ** -exponents[:, None]
    floors, factors = _linear(powers, errors) if has_floor else _through_zero(powers, errors)
    left = ((errors - floors[:, None] - factors[:, None] * powers) ** 2).sum(1)
    best = int(left.argmin())
    exponent = float(exponents[best])
    return Law(float(floors[best]), float(factors[best]) * scale**exponent, exponent, has_floor)


def _through_zero(powers: Floats, errors: Floats) -> tuple[Floats, Floats]:
    factors = np.maximum(0, (powers * errors).sum(1) / (powers**2).sum(1))
    return np.zeros(len(powers)), factors


def _linear(powers: Floats, errors: Floats) -> tuple[Floats, Floats]:
    """Floor and factor for each exponent; where the best of one is below 0, it is 0 and the other's best remains."""
    centred = powers - powers.mean(1, keepdims=True)
    factors = (centred * errors).sum(1) / (centred**2).sum(1)
    floors = errors.mean() - factors * powers.mean(1)
    _, alone = _through_zero(powers, errors)
    factors = np.where(floors < 0, alone, factors)
    floors = np.maximum(floors, 0)
    flat = factors < 0
    return np.where(flat, errors.mean(), floors), np.where(flat, 0, factors)
