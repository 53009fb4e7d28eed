"""The Pareto front: what is not beaten by anything that costs no more."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """The places of the points that no other point beats: as cheap and better, or cheaper and as good.

    Args:
        costs: What each costs: fewer parameters, fewer milliseconds are better.
        gains: What each reaches: higher is better.

    Returns:
        The places by rising cost; of equal points the first.
    """
    order = sorted(range(len(costs)), key=lambda place: (costs[place], -gains[place], place))
    front: list[int] = []
    for place in order:
        if not front or gains[place] > gains[front[-1]]:
            front.append(place)
    return front
