from __future__ import annotations

import dataclasses
import math

import pytest

from clipdistill.evaluation import RetrievalReport
from clipdistill.report import tables
from clipdistill.report.tables import headline, result_tables


def test_every_value_of_the_report_stands_in_its_cell(retrieval):
    found = {(table.set, table.direction): table for table in result_tables(retrieval)}
    assert set(found) == {(name, way) for name in ("test", "unseen") for way in ("text_to_image", "image_to_text")}
    for (name, way), table in found.items():
        for line in table.lines:
            for (measure, k), cell in zip(table.columns, line.cells, strict=True):
                rows = [
                    row
                    for row in retrieval.rows
                    if (row.set, row.direction, row.pairing, row.search) == (name, way, line.pairing, line.search)
                    and row.measure == measure
                    and (row.k == k or not k)
                ]
                assert cell.value == (rows[0].value if rows else None)


def test_columns_follow_the_cutoffs_and_lines_the_road_down_from_the_teacher(retrieval):
    table = result_tables(retrieval)[0]
    assert [tables.heading(*column) for column in table.columns] == [
        "success@1",
        "success@5",
        "success@10",
        "recall@10",
        "overlap@10",
        "teacher top1@10",
        "RBO",
        "retention@10",
    ]
    assert [(line.pairing, line.search) for line in table.lines] == [
        (pairing, search)
        for pairing in ("teacher", "student_query_teacher_index", "student")
        for search in ("exact", "index:Flat")
    ]
    assert table.lines[-1].label == "student, through Flat"
    assert table.protocol == "40 text queries, each against 20 pictures"


def test_the_set_that_is_hardest_for_the_teacher_comes_first(retrieval):
    def hardness(name):
        return retrieval.value(measure="success", k=10, pairing="teacher", set=name)

    assert hardness("unseen") < hardness("test")
    assert [table.set for table in result_tables(retrieval)] == ["unseen", "unseen", "test", "test"]
    swapped = dataclasses.replace(
        retrieval,
        rows=tuple(
            dataclasses.replace(row, value=0.0)
            if (row.set, row.pairing, row.measure) == ("test", "teacher", "success")
            else row
            for row in retrieval.rows
        ),
    )
    assert [table.set for table in result_tables(swapped)] == ["test", "test", "unseen", "unseen"]


def test_the_largest_cutoff_stands_for_the_table_where_10_was_not_measured(retrieval):
    rows = tuple(row for row in retrieval.rows if row.k in (1, 5) or row.measure == "rbo")
    table = result_tables(dataclasses.replace(retrieval, rows=rows))[0]
    assert table.k == 5
    assert ("overlap", 5) in table.columns
    assert table.cell("success", "student").value == retrieval.value(measure="success", k=5, set="unseen")


def test_a_cell_that_was_not_measured_is_na(retrieval):
    table = result_tables(retrieval)[0]
    assert table.cell("retention", "teacher").text == "n/a"
    assert table.cell("success", "nobody").text == "n/a"
    assert table.cell("success", "student", "index").value is not None
    assert result_tables(RetrievalReport((), (), ())) == []


def test_the_headline_says_retention_size_and_speed(report, retrieval):
    found = result_tables(retrieval)
    kept = found[0].cell("retention", "student")
    row = next(row for row in retrieval.rows if row.measure == "retention" and row.value == kept.value)
    low, high = 100 * row.low, 100 * row.high
    assert headline(report, found)[0] == (
        f"The student keeps {100 * kept.value:.1f}% [{low:.1f}, {high:.1f}] of the teacher's success@10 on “unseen”, "
        "with 5.0× fewer parameters, 9.2× the pictures per second and 12.5× the texts per second."
    )
    assert headline(report, found)[1].endswith("of the teacher's success@10 on “test”.")
    assert len(headline(report, found)) == 2


def test_the_headline_claims_nothing_that_is_not_known(report, retrieval):
    report["sizes"]["teacher"] = {"name": "stored embeddings", "dim": 16}
    report["speeds"] = {"student": {"images_per_s": 92.0}}
    assert headline(report, result_tables(retrieval))[0].endswith("on “unseen”.")
    assert headline({}, []) == []


def test_a_student_that_is_larger_is_not_called_smaller(report, retrieval):
    report["sizes"]["student"]["parameters"] = 2 * 28_400_000
    assert "with 2.0× the parameters" in headline(report, result_tables(retrieval))[0]


def test_sizes_and_speeds_side_by_side(report):
    rows = {row.name: (row.teacher, row.student, row.ratio) for row in tables.comparisons(report)}
    assert rows["parameters"] == ("28.4 M", "5.68 M", "5.0×")
    assert rows["texts a second"] == ("100", "1,250", "12.5×")
    report["sizes"]["teacher"].pop("parameters")
    report["speeds"]["teacher"] = {"images_per_s": 0.0}
    rows = {row.name: (row.teacher, row.student, row.ratio) for row in tables.comparisons(report)}
    assert rows["parameters"] == ("n/a", "5.68 M", "n/a")
    assert rows["pictures a second"][2] == "n/a"
    assert {row.ratio for row in tables.comparisons({})} == {"n/a"}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (tables.decimal(0.48249), "0.482"),
        (tables.decimal(math.nan), "n/a"),
        (tables.decimal(None), "n/a"),
        (tables.share(0.9666), "96.7%"),
        (tables.count(12345), "12,345"),
        (tables.count("many"), "n/a"),
        (tables.amount(0.1234), "0.123"),
        (tables.amount(1234.5), "1,234"),
        (tables.times(0.85), "0.85×"),
        (tables.times(9.04), "9.0×"),
        (tables.times(250.0), "250×"),
        (tables.times(None), "n/a"),
    ],
)
def test_numbers_as_text(shown, expected):
    assert shown == expected
