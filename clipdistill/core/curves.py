"""Curves of straight pieces over a share of something, such as a weight's factor over the training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

Points = Sequence[tuple[float, float]]


def faults_of(points: Points) -> Iterator[str]:
    """What is wrong with a curve's points, a phrase each: shares rise within 0 to 1, values are finite and not below 0.

    Args:
        points: Each a share and the value there.
    """
    if not points:
        yield "has no points; give [[share, factor], ...]"
    for share, value in points:
        if not 0 <= share <= 1:
            yield f"shares lie between 0 and 1; got {share}"
        if not (math.isfinite(value) and value >= 0):
            yield f"factors are finite numbers, 0 or more; got {value}"
    for (before, _), (after, _) in pairwise(points):
        if not before < after:
            yield f"shares rise from point to point; got {before} and then {after}"


def value_at(points: Points, share: float) -> float:
    """The value of a curve: on the line between the two nearest points, level before the first and after the last.

    Args:
        points: Each a share and the value there, at least one, the shares rising.
        share: Where to read it.
    """
    if share <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    return points[-1][1]
