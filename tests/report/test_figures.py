from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
import pytest

from clipdistill.report.figures import Size, recall_budget, size_against_recall, training_curves

SIZES = [
    Size("teacher", 28_400_000, 113.6, {"unseen": 0.5, "test": 0.99}),
    Size("student", 5_900_000, 23.6, {"unseen": 0.48, "test": 0.96}),
]
STEPS = [("teacher", 0.5), ("student's queries", 0.49), ("student", 0.45), ("index", None)]


def texts(drawing):
    return [element.text for element in ET.fromstring(drawing.svg).iter() if element.tag.endswith("text")]


def all_drawings(metrics):
    return [*training_curves(metrics), size_against_recall(SIZES, 10), recall_budget("unseen", STEPS)]


def test_figures_are_well_formed_and_hold_nothing_from_outside(metrics):
    for drawing in all_drawings(metrics):
        root = ET.fromstring(drawing.svg)
        assert root.tag == "svg"
        assert root.get("role") == "img"
        assert root.get("aria-label") == f"{drawing.title}: {drawing.text}"
        assert re.search(r"https?:|xmlns|<metadata|<!--|<script|<style|font-family|\bDate\b", drawing.svg) is None


def test_names_inside_figures_resolve_and_are_not_shared(metrics):
    seen: dict[str, str] = {}
    for drawing in all_drawings(metrics):
        named = set(re.findall(r' id="([^"]+)"', drawing.svg))
        used = set(re.findall(r'(?:href="|url\()#([^")]+)', drawing.svg))
        assert used == named
        assert all(seen.setdefault(name, drawing.title) == drawing.title for name in named)


def test_the_losses_balance_has_a_figure_of_its_own_and_narrower_widths_none():
    plain = [{"step": step, "loss": 3.0 / step, "clip": 2.0 / step} for step in range(1, 6)]
    extra = [{"log_variance_clip": -0.1 * step, "clip@64": 9.0} for step in range(1, 6)]
    found = training_curves([line | more for line, more in zip(plain, extra, strict=True)])
    assert [drawing.title for drawing in found] == ["Training loss", "Learned balance of the losses"]
    assert found[0] == training_curves(plain)[0]
    assert found[1].text == "log variance clip from -0.1 at step 1 to -0.5 at step 5"


def test_colours_follow_the_page(metrics):
    for drawing in all_drawings(metrics):
        assert "var(--ink)" in drawing.svg
        colours = set(re.findall(r"#[0-9a-f]{6}\b", drawing.svg))
        assert colours == set()


def test_the_same_values_give_the_same_figures_whatever_the_users_style_is(metrics):
    first = all_drawings(metrics)
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "lines.linewidth": 9, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        second = all_drawings(metrics)
        assert dict(mpl.rcParams) == before
    assert first == second


def test_training_curves_have_a_panel_for_loss_agreement_and_rate(metrics):
    loss, agreement, rate = training_curves(metrics)
    assert (loss.title, agreement.title, rate.title) == (
        "Training loss",
        "Validation against the teacher",
        "Learning rate",
    )
    assert {"loss", "clip", "feature image"} <= set(texts(loss))
    assert "grad norm" not in texts(loss)
    assert {"overlap@10 text → picture", "score", "kept: 0.150"} <= set(texts(agreement))
    assert {"image", "text, other"} <= set(texts(rate)), "curves that lie on one another share one name"
    assert f"loss from {3.6 * math.exp(-1 / 8):.4g} at step 10 to {3.6 * math.exp(-2.5):.4g} at step 200" in loss.text


def test_flat_lines_are_read_too():
    lines = [
        {"step": 1, "epoch": 0, "loss": 2.0, "clip": 1.5, "lr": 0.1, "data_seconds": 3.0},
        {
            "step": 2,
            "overlap10_text_to_image": 0.3,
            "success10_text_to_image": 0.4,
            "score": 0.3,
        },  # score: never merged
    ]
    loss, agreement, rate = training_curves(lines)
    assert loss.text == "loss from 2 at step 1 to 2 at step 1; clip from 1.5 at step 1 to 1.5 at step 1"
    assert "overlap@10 text → picture from 0.3" in agreement.text
    assert "; score from 0.3" in agreement.text, "what decides is never merged with what equals it"
    assert rate.text.startswith("learning rate from 0.1")


def test_a_lines_rates_and_counts_are_no_losses():
    """The names that the training loop writes."""
    line = {"step": 1, "epoch": 0.1, "loss": 2.0, "clip": 1.5, "lr": 0.1, "lr_image": 0.2, "lr_head": 0.3}
    line |= {"lr_text": 0.4, "grad_norm": 5.0, "rejected": 6, "samples_per_s": 7.0}
    skipped = {"step": 2, "skipped": 1, "skipped_loss": 8.0, "skipped_grad_norm": 9.0}
    loss, rate = training_curves([line, skipped])
    assert loss.text == "loss from 2 at step 1 to 2 at step 1; clip from 1.5 at step 1 to 1.5 at step 1"
    assert [part.split(" from ")[0] for part in rate.text.split("; ")] == ["learning rate", "image", "head", "text"]


def test_lines_without_numbers_make_no_figures():
    assert training_curves([]) == []
    lines = [
        {"loss": 1.0},
        {"step": 3},
        {"step": 4, "loss": None},
        {"step": 5, "skipped": {"loss": 1.0, "keys": ["a"]}},
    ]
    assert training_curves(lines) == []


def test_long_trainings_are_thinned():
    short, long = (training_curves({"step": n, "loss": 1 + n % 7} for n in range(top))[0] for top in (200, 20_000))
    assert len(long.svg) < 1.5 * len(short.svg)


def test_the_recall_budget_names_values_and_changes():
    drawing = recall_budget("unseen", STEPS)
    assert [text.replace("\u2002", " ") for text in texts(drawing)] == [
        "teacher",
        "0.500",
        "student's queries",
        "0.490 −0.010",
        "student",
        "0.450 −0.040",
    ]
    assert drawing.text == "teacher 0.500; student's queries 0.490; student 0.450"


def test_the_bars_are_as_long_as_their_values():
    drawing = recall_budget("unseen", [("teacher", 0.8), ("student", 0.6)])
    widths = [
        float(x2) - float(x1)
        for x1, x2 in re.findall(r"M ([\d.]+) [\d.]+ L ([\d.]+) ", drawing.svg.replace("\n", " ").replace("  ", " "))
    ]
    teacher, lost, student = widths[-3:]
    assert student / teacher == pytest.approx(0.75, abs=1e-4)
    assert lost / teacher == pytest.approx(0.25, abs=1e-4)


def test_a_budget_of_one_step_is_none():
    assert recall_budget("x", [("teacher", 0.5), ("student", None)]) is None
    assert recall_budget("x", [("teacher", 0.0), ("student", 0.0)]) is not None


def test_sizes_are_labelled_with_parameters_and_megabytes():
    found = texts(size_against_recall(SIZES, 10))
    assert {"0.500  unseen", "0.990  test", "0.480", "0.960", "teacher", "28.4 M · 114 MB", "5.9 M · 24 MB"} <= set(
        found
    )


def test_a_teacher_of_unknown_size_is_a_level():
    teacher = Size("teacher", None, None, {"unseen": 0.5})
    drawing = size_against_recall([teacher, Size("student", 5e6, None, {"unseen": 0.4})], 10)
    assert "teacher 0.500  unseen" in texts(drawing)
    assert "5 M" in texts(drawing)
    assert size_against_recall([teacher], 10) is None
    assert size_against_recall([Size("student", 5e6, 20.0, {"unseen": None})], 10) is None


def test_names_are_escaped_and_no_formulas():
    name = '<b>$x$ "&'
    for drawing in (size_against_recall([Size("student", 5e6, 20.0, {name: 0.5})], 10), recall_budget(name, STEPS)):
        assert "<b>" not in drawing.svg
        ET.fromstring(drawing.svg)
    assert f"0.500  {name}" in texts(size_against_recall([Size("student", 5e6, 20.0, {name: 0.5})], 10))
