from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from sweep import synthetic
from sweep.synthetic import LR, PRESET, SIZES, TEMPERATURE, grid, outcome

from clipdistill.sweep import effects as module
from clipdistill.sweep.effects import Spread, analyse
from clipdistill.sweep.front import pareto_front
from clipdistill.sweep.law import Law, fit_curve, fit_law

HEAT = {0.5: 0.0, 1.0: 0.1, 2.0: 0.15, 4.0: 0.05}
SIZE = {"nano": 0.0, "tiny": 0.02, "small": 0.03}


def additive(params):
    return 0.3 + HEAT[params["loss.temperature"]] + SIZE[params["student.text"]]


def test_a_full_grid_s_levels_are_the_means_of_its_trials():
    trials = grid([TEMPERATURE, SIZES], additive, seeds=3)
    for effect in analyse([TEMPERATURE, SIZES], trials).effects:
        for level in effect.levels:
            inside = [one.objective for one in trials if one.params[effect.axis.key] == level.value]
            assert level.objective == pytest.approx(np.mean(inside))
            assert level.trials == len(inside)
            assert level.low < level.objective < level.high


def test_importance_is_the_analysis_of_variance_s_epsilon_squared():
    """Against the textbook's sums of squares of a balanced two-way table."""
    trials = grid([TEMPERATURE, SIZES], additive, seeds=2, noise=0.02)
    table = np.array([one.objective for one in trials]).reshape(4, 3)
    total = ((table - table.mean()) ** 2).sum()
    rows = 3 * ((table.mean(1) - table.mean()) ** 2).sum()
    columns = 4 * ((table.mean(0) - table.mean()) ** 2).sum()
    error = (total - rows - columns) / (3 * 2)
    heat, size = analyse([TEMPERATURE, SIZES], trials).effects
    assert heat.importance == pytest.approx((rows - 3 * error) / total)
    assert size.importance == pytest.approx(max(0, (columns - 2 * error) / total))


def test_uneven_trials_compare_like_with_like():
    """The high temperature was tried with small students only; the plain means would say that it is bad."""
    all_trials = grid(
        [TEMPERATURE, SIZES], lambda p: 0.2 + 5 * SIZE[p["student.text"]] + HEAT[p["loss.temperature"]] / 10
    )
    trials = [
        one
        for one in all_trials
        if (one.params["loss.temperature"] != 2.0 or one.params["student.text"] == "nano")
        and (one.params["loss.temperature"] != 0.5 or one.params["student.text"] != "nano")
    ]
    heat = analyse([TEMPERATURE, SIZES], trials).effects[0]
    plain = {
        value: np.mean([one.objective for one in trials if one.params["loss.temperature"] == value]) for value in HEAT
    }
    assert max(plain, key=plain.get) != 2.0
    assert heat.levels[heat.best].value == 2.0
    gain = heat.contrasts[2, 0]
    assert gain.gain == pytest.approx(0.015, abs=0.005)


def test_what_a_seed_does_to_all_trials_alike_is_no_spread():
    trials = grid([TEMPERATURE, SIZES], additive, seeds=4, noise=0.004)
    spread = analyse([TEMPERATURE, SIZES], trials).spread
    assert spread.deviation == pytest.approx(0.004 / math.sqrt(4), rel=0.5)  # the shared shifts are ten times larger


def test_what_the_axes_leave_unexplained_is_spread_too():
    """Two axes that only work together: an additive model cannot say so, and must not be sure."""
    trials = grid(
        [TEMPERATURE, SIZES],
        lambda p: 0.3 + 0.1 * (p["loss.temperature"] > 1) * (p["student.text"] == "small"),
        seeds=3,
        noise=0.001,
    )
    spread = analyse([TEMPERATURE, SIZES], trials).spread
    assert spread.source == "trials"
    assert spread.deviation > 0.01


def test_chance_is_rarely_taken_for_a_difference():
    """Of 60 sweeps in which nothing matters, some 5 in 100 axes may seem to."""
    draw = np.random.default_rng(3)
    found = []
    for _ in range(60):
        trials = []
        for number, (heat, size) in enumerate(itertools.product(TEMPERATURE.values, SIZES.values)):
            made = outcome(number, {"loss.temperature": heat, "student.text": size}, 0.5)
            seeds = [dataclasses.replace(seed, objective=float(draw.normal(0.5, 0.02))) for seed in made.seeds]
            trials.append(dataclasses.replace(made, seeds=tuple(seeds)))
        found += [effect.matters for effect in analyse([TEMPERATURE, SIZES], trials).effects]
    assert np.mean(found) < 0.12


def test_trials_that_are_all_alike_differ_in_nothing():
    """Whatever the last bit of their sums is."""
    trials = grid([TEMPERATURE, SIZES], lambda _: 0.1 + 0.2, seeds=2, noise=0.0)
    nudged = dataclasses.replace(trials[5].seeds[0], objective=trials[5].seeds[0].objective + 1e-16)
    trials[5] = dataclasses.replace(trials[5], seeds=(nudged, trials[5].seeds[1]))
    assert not any(effect.matters for effect in analyse([TEMPERATURE, SIZES], trials).effects)


def test_the_critical_value_is_student_s_and_grows_with_the_number_of_contrasts():
    one = module._critical(np.ones((1, 1)), 10)
    assert one == pytest.approx(2.228, abs=0.12)  # t(0.975, 10)
    assert module._critical(np.eye(5), 10) > one
    assert module._critical(np.ones((1, 1)), 3) > one


def test_a_range_is_a_parabola_over_its_logarithm():
    best, draw = 1e-3, np.random.default_rng(0)
    trials = [
        outcome(number, {"train.lr": float(value)}, 0.5 - 0.05 * math.log10(value / best) ** 2, noise=0.002)
        for number, value in enumerate(np.exp(draw.uniform(math.log(1e-4), math.log(1e-2), 14)))
    ]
    (effect,) = analyse([LR], trials).effects
    assert effect.matters
    assert effect.levels[effect.best].value == pytest.approx(best, rel=0.8)
    assert effect.importance > 0.8


def test_too_few_or_confounded_trials_say_nothing():
    trials = grid([TEMPERATURE, SIZES], additive, seeds=1)
    assert analyse([TEMPERATURE, SIZES], trials[:1]) == module.Effects(None, ())
    bare = analyse([TEMPERATURE, SIZES], trials[:4])
    assert bare.spread is None
    assert [effect.matters for effect in bare.effects] == [False, False]
    assert all(level.low is None for effect in bare.effects for level in effect.levels)
    diagonal = [one for one in trials if (one.number // 3) == one.number % 3]
    assert analyse([TEMPERATURE, SIZES], diagonal).effects == ()


def test_one_seed_a_trial_still_gives_a_spread_where_trials_are_enough():
    found = analyse([TEMPERATURE, SIZES], grid([TEMPERATURE, SIZES], additive, seeds=1, noise=0.01))
    assert found.spread.source == "trials"
    assert found.spread.freedom == 12 - 1 - 3 - 2
    assert isinstance(found.spread, Spread)


@pytest.mark.parametrize(("floor", "factor", "exponent"), [(0.0, 3.0, 0.3), (0.2, 5.0, 0.5), (0.35, 40.0, 1.0)])
def test_the_law_finds_known_parameters(floor, factor, exponent):
    rows = np.array([500, 1000, 2000, 4000, 8000, 16000], float)
    law = fit_law(rows, floor + factor * rows**-exponent)
    assert law.has_floor
    assert (law.floor, law.exponent) == pytest.approx((floor, exponent), abs=0.03)
    for count in (500, 16000, 32000):
        assert law.error(count) == pytest.approx(floor + factor * count**-exponent, abs=0.003)


def test_a_law_through_few_points_has_no_floor_and_one_through_two_is_none():
    rows = np.array([1000, 2000, 4000], float)
    law = fit_law(rows, 3 * rows**-0.25)
    assert not law.has_floor
    assert (law.factor, law.exponent) == pytest.approx((3, 0.25), rel=0.05)
    assert "n^-0.2" in law.formula
    assert fit_curve([1000, 2000], [0.3, 0.4], 0.01) is None


@pytest.mark.parametrize("errors", [[0.5, 0.5, 0.5, 0.5, 0.5], [0.3, 0.4, 0.5, 0.6, 0.7], [0.0, 0.0, 0.0, 0.0, 0.0]])
def test_data_that_do_not_help_give_a_flat_law(errors):
    law = fit_law(np.array([1, 2, 4, 8, 16], float), np.array(errors))
    assert law.error(16) - law.error(32) == pytest.approx(0, abs=1e-9)


def test_the_gain_of_twice_the_data_lies_in_its_interval_and_narrows_with_the_noise():
    rows = [1000, 2000, 4000, 8000]
    truth = Law(0.0, 3.0, 0.3, has_floor=False)
    reached = [1 - truth.error(count) for count in rows]
    wide, narrow = (fit_curve(rows, reached, deviation) for deviation in (0.01, 0.001))
    expected = truth.error(8000) - truth.error(16000)
    for curve in (wide, narrow):
        assert curve.low < expected < curve.high
        assert curve.gain == pytest.approx(expected, abs=1e-3)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert fit_curve(rows, reached, None).low is None


def test_the_front_is_what_brute_force_says():
    draw = np.random.default_rng(1)
    for _ in range(50):
        count = int(draw.integers(1, 12))
        costs, gains = (draw.integers(0, 6, count).tolist() for _ in range(2))

        def beaten(place, costs=costs, gains=gains):
            mine = (costs[place], gains[place])
            return any(
                (costs[other] <= mine[0] and gains[other] >= mine[1])
                and ((costs[other], gains[other]) != mine or other < place)
                for other in range(len(costs))
                if other != place
            )

        expected = sorted((place for place in range(count) if not beaten(place)), key=lambda place: costs[place])
        assert pareto_front(costs, gains) == expected


def test_presets_are_levels_in_the_axis_s_order():
    trials = grid([PRESET], lambda p: {"default": 0.3, "clip": 0.2, "fd": 0.25}[p["loss.preset"]], seeds=3)
    (effect,) = analyse([PRESET], trials).effects
    assert [level.value for level in effect.levels] == ["default", "clip", "fd"]
    assert effect.levels[effect.best].value == "default"
    assert synthetic.PARAMETERS["nano"] == effect.levels[0].parameters
