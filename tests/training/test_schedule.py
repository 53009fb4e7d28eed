from __future__ import annotations

import math

import pytest

from clipdistill.training.schedule import rate


def test_the_warm_up_is_linear_and_ends_at_the_full_rate():
    assert [rate(step, 100, 4, 0.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_cosine_starts_at_the_peak_and_ends_at_the_final_share():
    rates = [rate(step, 101, 1, 0.1) for step in range(101)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.55)
    assert rates[25] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("warmup", [0, 1, 5, 10, 50])
def test_any_lengths_give_a_rate_between_zero_and_one(steps, warmup):
    rates = [rate(step, steps, warmup, 0.0) for step in range(steps)]
    assert all(0 <= value <= 1 for value in rates)
    assert rates[0] > 0


def test_no_warm_up_starts_at_the_full_rate():
    assert rate(0, 10, 0, 0.0) == 1.0
    assert rate(9, 10, 0, 0.25) == pytest.approx(0.25)
