import copy
import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from rich.console import Console

from clipdistill.evaluation import RetrievalReport
from clipdistill.evaluation.classification import SCHEMA, Side, evaluate_classes, judge
from clipdistill.report.classes import LISTED, class_headline, class_tables
from clipdistill.report.html import render
from clipdistill.report.terminal import summary


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def classification():
    rng = np.random.default_rng(2)
    count = LISTED + 3
    classes, truth = unit(rng.normal(size=(count, 16))), np.arange(200) % count
    teacher = Side(unit(classes[truth] + 0.3 * rng.normal(size=(200, 16))), 20.0)
    student = Side(unit(teacher.images + 0.2 * rng.normal(size=(200, 16))), 15.0)
    names = [f"<b>thing {number}</b>" for number in range(count)]
    result = evaluate_classes("far <set>", names, names, truth, judge(classes, teacher, student))
    return {"schema": SCHEMA, "classes": [], "templates": ["{}"], "sets": [result.to_json()]}


@pytest.fixture
def classified(report, classification):
    return {**report, "classification": copy.deepcopy(classification)}


def printed(report):
    console = Console(width=160, record=True, file=io.StringIO())
    for item in summary(report):
        console.print(item)
    return console.export_text()


def test_a_run_of_another_task_has_no_tables(report):
    assert class_tables(report) == []
    assert class_headline(report) == []
    assert "Classification" not in render(report, [], {}, strips=2)


def test_the_page_and_the_terminal_show_both_models(classified):
    page = render(classified, [], {}, strips=2)
    found = classified["classification"]["sets"][0]
    teacher, student = (f"{100 * found[who]['top1']['value']:.1f}%" for who in ("teacher", "student"))
    assert teacher != student
    text = printed(classified)
    for shown in (page, text):
        assert teacher in shown and student in shown
        assert f"{found['student']['ece']:.3f}" in shown
        assert f"({student} of {teacher})" in shown
    assert "<b>thing" not in page
    assert "&lt;b&gt;thing" in page
    assert "far <set>: classification, 200 pictures, 33 classes" in text
    assert page.count("&lt;b&gt;thing") == LISTED
    assert "3 more in" in page


def test_the_worst_classes_come_first(classified):
    (table,) = class_tables(classified)
    losses = [line["student"] - line["teacher"] for line in table.shown]
    assert losses == sorted(losses)
    assert losses[0] < 0
    ET.fromstring(table.diagram.svg)
    assert "teacher: " in table.diagram.text and "% right at " in table.diagram.text


def test_what_is_not_defined_is_n_a(classified):
    one = classified["classification"]["sets"][0]
    one["retention"] = {"value": None, "low": None, "high": None}
    one["teacher"]["top5"] = {"value": None, "low": None, "high": None}
    assert "keeps n/a of the teacher's top-1" in class_headline(classified)[0]
    assert "n/a" in render(classified, [], {}, strips=0)


def test_where_retrieval_was_left_out_the_page_says_why(classified):
    bare = RetrievalReport((), (), ({"set": "far <set>", "left_out": ["no text is trained on"]},)).to_json()
    page = render({**classified, "evaluation": bare}, [], {}, strips=2)
    assert "Not measured; the run, at the end, says why." in page
    assert "no text is trained on" in page
    assert "Nothing was evaluated" not in page
