"""The sentences that a sweep ends with: each appears where its rule holds, and not where it does not."""

from __future__ import annotations

import json
import math

import pytest
import tiny
from sweep import synthetic
from sweep.synthetic import FRACTION, PRESET, SIZES, STUDENT, TEMPERATURE, config, grid, outcome

from clipdistill.sweep.axes import Axis
from clipdistill.sweep.loop import sweep_lines
from clipdistill.sweep.outcome import FAILED, PRUNED
from clipdistill.sweep.results import base_value, sweep_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("findings")
    tiny.run_toml(folder)
    return folder


def found(folder, axes, outcomes, **sections):
    """The findings by rule; a rule that speaks twice has its texts in a row."""
    texts: dict[str, str] = {}
    for finding in sweep_results(config(folder, **sections), axes, "score", outcomes)["findings"]:
        texts[finding["rule"]] = " ".join(
            [*([texts[finding["rule"]]] if finding["rule"] in texts else []), finding["text"]]
        )
    return texts


def heat(params):
    return 0.4 - 0.05 * math.log2(params["loss.temperature"] / 2) ** 2


def size(steps):
    return lambda params: 0.4 + steps[params["student.text"]]


def test_a_temperature_that_was_not_tuned(folder):
    texts = found(folder, [TEMPERATURE], grid([TEMPERATURE], heat))
    assert set(texts) == {"tuned"}
    assert texts["tuned"].startswith("loss.temperature was not tuned: 2.0 gains +0.0")
    assert "over the configuration's 1.0." in texts["tuned"]
    assert "end of the axis" not in texts["tuned"]


def test_a_temperature_whose_best_is_at_the_end(folder):
    texts = found(folder, [TEMPERATURE], grid([TEMPERATURE], lambda p: 0.3 + 0.02 * p["loss.temperature"]))
    assert "4.0 gains" in texts["tuned"]
    assert texts["tuned"].endswith("That is the end of the axis: values beyond it may be better.")


def test_a_temperature_that_is_well_chosen(folder):
    texts = found(folder, [TEMPERATURE], grid([TEMPERATURE], heat), loss={"temperature": 2.0})
    assert set(texts) == {"chosen"}
    assert texts["chosen"].startswith("loss.temperature = 2.0 is well chosen: ")


def test_a_base_that_was_not_tried(folder):
    texts = found(folder, [TEMPERATURE], grid([TEMPERATURE], heat), loss={"temperature": 3.0})
    assert texts["tuned"].startswith("loss.temperature = 2.0 gains")
    assert "configuration's" not in texts["tuned"]


def test_a_student_that_is_too_small(folder):
    texts = found(folder, [SIZES], grid([SIZES], size({"nano": 0, "tiny": 0.05, "small": 0.1})))
    assert set(texts) == {"larger"}
    assert 'student.text = "small" (11 M parameters) reaches' in texts["larger"]
    assert texts["larger"].startswith("The student is too small for this teacher")


def test_a_smaller_student_that_may_do(folder):
    texts = found(folder, [SIZES], grid([SIZES], size({"nano": 0, "tiny": 0.1, "small": 0.1}), seeds=4))
    assert set(texts) == {"small_enough"}
    assert texts["small_enough"].startswith('A smaller student may do: student.text = "tiny" (4 M parameters) reaches')
    assert 'student.text = "small" (11 M parameters) is not better beyond chance' in texts["small_enough"]
    flat = found(folder, [STUDENT], grid([STUDENT], lambda _: 0.5, seeds=4))
    assert set(flat) == {"small_enough", "nothing"}
    assert "(1.5 M parameters) reaches" in flat["small_enough"]


def learning(exponent, steps):
    def formula(params):
        rows = synthetic.ROWS * params["data.fraction"]
        return 1 - 3 * rows**-exponent + steps[params["student.text"]]

    return formula


def test_more_data_against_a_larger_student(folder):
    axes = [FRACTION, SIZES]
    rows = {"nano": 0, "tiny": 0.002, "small": 0.004}
    texts = found(folder, axes, grid(axes, learning(0.25, rows), noise=0.002, seeds=3))
    assert "(8,000 to 16,000 rows) would bring +0.0" in texts["more_data"]
    assert "n^-" in texts["more_data"]
    assert texts["data_or_size"].startswith("More data would help more than a larger student: twice the rows +0.0")
    parameters = {"nano": 0, "tiny": 0.3, "small": 0.6}
    texts = found(folder, axes, grid(axes, learning(0.25, parameters), noise=0.002, seeds=3))
    assert texts["data_or_size"].startswith("A larger student would help more than more data")


def test_data_that_do_not_help(folder):
    texts = found(folder, [FRACTION], grid([FRACTION], lambda _: 0.4, seeds=3))
    assert "more_data" not in texts
    assert "nothing" in texts


def test_what_matters_most(folder):
    axes = [TEMPERATURE, PRESET]
    preset = {"default": 0.0, "clip": -0.2, "fd": 0.1}
    texts = found(folder, axes, grid(axes, lambda p: heat(p) / 5 + preset[p["loss.preset"]]))
    assert texts["matters_most"].startswith("loss.preset matters most: it explains 9")
    assert "the next, loss.temperature" in texts["matters_most"]
    both = {"default": 0.0, "clip": 0.02, "fd": 0.13}
    alike = found(folder, axes, grid(axes, lambda p: heat(p) + both[p["loss.preset"]]))
    assert "matters_most" not in alike


def test_nothing_beyond_the_spread(folder):
    axes = [TEMPERATURE, PRESET]
    texts = found(folder, axes, grid(axes, lambda _: 0.4, seeds=3, noise=0.01))
    assert list(texts) == ["nothing"]
    assert texts["nothing"].startswith("No axis made a difference beyond the spread")


def test_too_few_to_tell(folder):
    texts = found(folder, [TEMPERATURE], grid([TEMPERATURE], heat, seeds=1))
    assert list(texts) == ["unknown"]
    assert "sweep.seeds" in texts["unknown"]


def test_a_trade_off(folder):
    better = {"default": 0.5, "clip": 0.3, "fd": 0.45}
    trials = [
        outcome(number, {"loss.preset": name}, better[name], seeds=3, success=0.9 if name == "clip" else 0.6)
        for number, name in enumerate(PRESET.values)
    ]
    texts = found(folder, [PRESET], trials)
    assert 'loss.preset = "default" agrees most with the teacher' in texts["trade_off"]
    assert 'loss.preset = "clip" has the most right answers (success@10 +0.300)' in texts["trade_off"]
    together = [outcome(n, {"loss.preset": name}, better[name], seeds=3) for n, name in enumerate(PRESET.values)]
    assert "trade_off" not in found(folder, [PRESET], together)


def test_failures_are_listed_with_their_reasons(folder):
    trials = grid([TEMPERATURE], heat)
    trials += [
        outcome(number, {"loss.temperature": 1.0}, 0, state=FAILED, reason="it diverged\nmore") for number in (4, 5)
    ]
    trials += [outcome(6, {"loss.temperature": 1.0}, 0, state=FAILED, reason="refused")]
    trials += [outcome(7, {"loss.temperature": 1.0}, 0.9, state=PRUNED, reason="stopped")]
    texts = found(folder, [TEMPERATURE], trials)
    assert texts["failed"] == "3 of 8 trials failed: it diverged (2 trials); refused."
    assert "2.0 gains" in texts["tuned"]  # what a stopped trial had reached does not count
    only = found(folder, [TEMPERATURE], trials[4:7])
    assert list(only) == ["failed"]


def test_axes_that_were_not_swept_give_nothing(folder):
    results = sweep_results(config(folder), [TEMPERATURE], "score", grid([TEMPERATURE], heat))
    assert results["fronts"] == {}
    assert results["learning_curve"] is None
    assert [effect["key"] for effect in results["effects"]] == ["loss.temperature"]


def test_the_fronts_of_a_capacity_sweep(folder):
    results = sweep_results(
        config(folder), [SIZES], "score", grid([SIZES], size({"nano": 0.1, "tiny": 0, "small": 0.2}))
    )
    assert results["fronts"]["parameters"] == [0, 2]
    assert set(results["fronts"]) == {"parameters", "picture_ms", "text_ms"}


@pytest.mark.parametrize(
    ("axis", "sections", "expected"),
    [
        (TEMPERATURE, {}, 1.0),  # the preset's
        (Axis("loss.temperature", (1, 2)), {}, 1),
        (Axis("train.lr", (), 1e-4, 1e-2), {"train": {"lr": 1e-3}}, 1e-3),
        (STUDENT, {"student": {"image": "tiny", "text": "tiny"}}, {"image": "tiny", "text": "tiny"}),
        (STUDENT, {"student": {"image": "tiny", "text": "nano"}}, None),
        (Axis("student", ({}, {"inherit": {"width": 0.25}})), {}, {}),
        (Axis("student.dim", (8, 16)), {}, None),
    ],
)
def test_the_configuration_s_own_value(folder, axis, sections, expected):
    assert base_value(config(folder, **sections), axis) == expected


def test_the_results_are_json_and_the_lines_say_them(folder):
    results = synthetic.everything(folder)
    assert json.loads(json.dumps(results, allow_nan=False))["schema"] == "clipdistill.sweep/1"
    lines = list(sweep_lines(results))
    assert lines[0].endswith("1 pruned, 2 failed")
    assert any(line.strip().startswith("The student is too small") for line in lines)
    best = max((trial for trial in results["trials"] if trial["state"] == "complete"), key=lambda one: one["objective"])
    assert f"trial {best['number']}:" in lines[1]
