"""The learning rate as a pure function of the step: linear warm-up, then half a cosine."""

from __future__ import annotations

import math


def rate(step: int, steps: int, warmup: int, final: float) -> float:
    """The share of the full learning rate that a step takes.

    It rises linearly over the warm-up, whose last step takes it all, and falls along half a cosine to ``final``, which
    is what the last step takes (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts). A warm-up as long as
    the run leaves no cosine.

    Args:
        step: The step, counted from 0.
        steps: How many steps the run has.
        warmup: How many of them warm up.
        final: The share at the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    peak = max(0, warmup - 1)
    fallen = (step - peak) / max(1, steps - 1 - peak)
    return final + (1 - final) * (1 + math.cos(math.pi * fallen)) / 2
