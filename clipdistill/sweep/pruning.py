"""Early stopping: a trial that lags behind the others at the same step is not trained to its end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from clipdistill.sweep.axes import Axis, Params, label

LEAST = 2
"""So many others must have come to the same step: the median of one is that one."""


def lags(step: int, scores: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> bool:
    """The median rule (Golovin et al. 2017, "Google Vizier").

    Args:
        step: The step that the trial is at.
        scores: Its scores by step, higher is better.
        others: The scores of the finished trials that it may be compared with.

    Returns:
        Whether its best score so far is below the median of the others' scores at this step.
    """
    there = [other[step] for other in others if step in other]
    best = max(score for at, score in scores.items() if at <= step)
    return len(there) >= LEAST and best < statistics.median(there)


def comparable(axes: Sequence[Axis], first: Params, second: Params) -> bool:
    """Whether two trials differ in settings only: in nothing that costs something, or that changes what is measured.

    A small student, a small share of the data and a short training always lag behind large ones. If they were stopped
    for it, the curves over capacity and data would lose the points that they are drawn for.
    """
    fixed = [axis.key for axis in axes if axis.kind != "choice"]
    return all(label(first[key]) == label(second[key]) for key in fixed)
