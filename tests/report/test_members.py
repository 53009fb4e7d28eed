from __future__ import annotations

import copy
import io

import pytest
from rich.console import Console

from clipdistill.report.html import render
from clipdistill.report.members import member_tables
from clipdistill.report.tables import result_tables
from clipdistill.report.terminal import summary


def row(measure, value, low, high, **where):
    place = {"set": "test", "direction": "text_to_image", "pairing": "member", "search": "exact", "k": 10, **where}
    return {**place, "measure": measure, "value": value, "low": low, "high": high, "queries": 24, "gallery": 12}


def member(name, success, kept, low, high, **more):
    rows = [
        row("success", success, success - 0.1, success + 0.1),
        row("success", 0.99, 0.9, 1.0, k=1),
        row("success", 0.98, 0.9, 1.0, direction="image_to_text"),
        row("retention", kept, low, high),
        row("overlap", 0.5, 0.4, 0.6),
    ]
    return {"name": name, "weight": 0.25, "scale": 100.0, "dim": 512, "rows": rows, **more}


@pytest.fixture
def told(report):
    return {
        **copy.deepcopy(report),
        "members": [
            member("ViT-B-32:openai", 0.40, 0.8, 0.7, 0.9, parameters=151_000_000),
            member("<b>other</b>", 0.45, 0.9, 0.85, 0.95),
        ],
    }


def of_test(told, retrieval):
    tables = member_tables(told, result_tables(retrieval))
    return next(table for table in tables if (table.set, table.title) == ("test", "Text → picture"))


def test_a_line_for_the_ensemble_and_for_each_member(told, retrieval):
    table = of_test(told, retrieval)
    assert table.k == 10
    whole, first, second = table.lines
    reached = retrieval.value(measure="success", k=10, pairing="teacher", set="test")
    assert whole.cells[0].value == reached
    assert first.facts == ("0.25", "100.0", "512", "151 M")
    assert [cell.text for cell in first.cells] == ["0.400", "80.0%", "0.500"]
    assert first.cells[1].interval == "[70.0, 90.0]"
    assert second.facts[3] == "n/a"


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.85, 0.95), "the ensemble is better than its best member."),
        ((0.85, 1.05), "the ensemble is neither better nor worse than its best member"),
        ((1.05, 1.20), "the ensemble is worse than its best member: distil from that one alone"),
        ((None, None), "the ensemble is neither better nor worse than its best member"),
    ],
)
def test_the_finding_is_about_the_best_member(told, retrieval, interval, verdict):
    kept = next(r for r in told["members"][1]["rows"] if r["measure"] == "retention")
    kept["low"], kept["high"] = interval
    finding = of_test(told, retrieval).finding
    assert verdict in finding
    assert "<b>other</b> alone 0.450" in finding


def test_without_ground_truth_there_is_no_finding(told, retrieval):
    for one in told["members"]:
        one["rows"] = [r for r in one["rows"] if r["measure"] == "overlap"]
    table = of_test(told, retrieval)
    assert table.finding == ""
    assert [cell.text for cell in table.lines[1].cells] == ["n/a", "n/a", "0.500"]


def test_page_and_terminal_show_the_members_and_escape_their_names(told, report, retrieval):
    page = render(told, [], {}, strips=0)
    assert 'href="#teachers"' in page
    assert "&lt;b&gt;other&lt;/b&gt;" in page
    assert "<b>other" not in page
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False, soft_wrap=True)
    for item in summary(told):
        console.print(item)
    text = console.file.getvalue()
    assert ["<b>other</b>", "0.25", "0.450", "90.0%", "[85.0,", "95.0]"] in [line.split() for line in text.splitlines()]
    assert of_test(told, retrieval).finding in text
    assert "The teachers" not in render(report, [], {}, strips=0)
    assert member_tables(report, result_tables(retrieval)) == []
