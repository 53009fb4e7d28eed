"""The sweep's page: well formed, self-contained, escaped, and showing what was swept and nothing else."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import tiny
from sweep import synthetic
from sweep.synthetic import LR, PRESET, TEMPERATURE, config, grid, outcome

from clipdistill.core.errors import MismatchError
from clipdistill.report.sweep import render_sweep, write_sweep_report
from clipdistill.report.sweep_figures import axis_figure, short
from clipdistill.sweep.axes import Axis
from clipdistill.sweep.outcome import FAILED
from clipdistill.sweep.results import sweep_results

VOID = {"meta", "br", "link", "img"}


class Balance(HTMLParser):
    """Checks that what is opened is closed, and collects the texts."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    tiny.run_toml(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads(json.dumps(synthetic.everything(folder)))


def parsed(page):
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    return balance


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_the_page_of_everything(results, tmp_path):
    write_sweep_report(tmp_path / "sweep.html", results)
    page = (tmp_path / "sweep.html").read_text()
    assert page == render_sweep(results)
    balance = parsed(page)
    assert headings(page) == ["What was found", "The axes", "Capacity", "Data", "Losses", "Trials", "The sweep"]
    assert re.search(r"https?:|<script|src=|@import", page) is None
    assert "var(--ink)" in page
    titles = [text.strip() for text in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    assert titles == [
        "Share of the differences that each axis explains",
        "Objective against loss.temperature",
        "Objective against student.text",
        "Objective against loss.preset",
        "Objective against parameters",
        "Objective against picture latency",
        "Objective against text latency",
        "Learning curve",
        "Right answers against agreement",
        "Validation over the steps",
    ]
    text = " ".join(balance.texts)
    assert "The student is too small for this teacher" in text
    assert "n/a" in text  # the failed trials'
    assert balance.tags.count("tr") == len(results["trials"]) + 1
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert ET.fromstring(svg).get("role") == "img"
        assert ">n/a<" not in svg


def test_what_was_not_swept_has_no_figure(folder):
    trials = grid([TEMPERATURE], lambda p: p["loss.temperature"] / 10)
    page = render_sweep(sweep_results(config(folder), [TEMPERATURE], "score", trials))
    assert headings(page) == ["What was found", "The axes", "Losses", "Trials", "The sweep"]
    assert "Share of the differences" not in page
    other = render_sweep(sweep_results(config(folder), [LR], "score", []))
    assert headings(other) == ["What was found", "Trials", "The sweep"]
    assert "0 trials complete" in other


def test_a_range_and_one_seed(folder):
    trials = [outcome(n, {"train.lr": 1e-4 * 2**n}, 0.3 + 0.01 * n, seeds=1) for n in range(7)]
    page = render_sweep(sweep_results(config(folder), [LR], "score", trials))
    parsed(page)
    assert "Objective against train.lr" in page
    assert "0.0001 to 0.01, logarithmic" in page


def test_hostile_names_are_escaped(folder):
    evil = '<script>alert("x")</script>&$x$\x00'
    axis = Axis("student.image", (evil, "nano"))
    trials = [outcome(n, {"student.image": value}, 0.3 + n / 10) for n, value in enumerate(axis.values)]
    trials.append(outcome(2, {"student.image": evil}, 0, state=FAILED, reason=evil))
    results = sweep_results(config(folder, name=evil), [axis], "score", trials)
    page = render_sweep(json.loads(json.dumps(results)))
    balance = parsed(page)
    assert "script" not in balance.tags
    assert "\x00" not in page
    assert "<script" not in page


def test_other_schemas_are_refused(results):
    with pytest.raises(MismatchError, match="schema"):
        render_sweep({**results, "schema": "clipdistill.sweep/2"})


def test_the_same_results_give_the_same_bytes(results):
    assert render_sweep(results) == render_sweep(json.loads(json.dumps(results)))


def test_a_curve_marks_its_best_and_the_configured_value(folder):
    results = sweep_results(
        config(folder), [TEMPERATURE], "score", grid([TEMPERATURE], lambda p: p["loss.temperature"])
    )
    drawing = axis_figure(results["effects"][0], 1.0, results["trials"])
    texts = [element.text for element in ET.fromstring(drawing.svg).iter() if element.tag.endswith("text")]
    assert "configured" in texts
    assert {"0.5", "1", "2", "4"} <= set(texts)
    names = sweep_results(config(folder), [PRESET], "score", grid([PRESET], lambda p: len(p["loss.preset"]) / 10))
    drawing = axis_figure(names["effects"][0], "default", names["trials"])
    assert any("default" in (element.text or "") for element in ET.fromstring(drawing.svg).iter())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"image": "nano", "text": "tiny"}, "image: nano, text: tiny"),
        ({}, "as configured"),
        ([64, 32], "[64, 32]"),
        (0.30000000000000004, "0.3"),
        (True, "True"),
        ("x" * 50, "x" * 29 + "…"),
    ],
)
def test_values_in_a_few_letters(value, text):
    assert short(value) == text
