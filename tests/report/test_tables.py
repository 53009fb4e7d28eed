from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from clipdistill.data.records import Pair, Picture
from clipdistill.evaluation import Embedded, RetrievalReport, evaluate_query_side, judged
from clipdistill.report import tables
from clipdistill.report.strips import strips_of
from clipdistill.report.tables import comparisons, headline, result_tables, savings


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


def asked_of_the_teacher(name, number):
    """A report of a student without pictures, on random vectors."""
    pairs = [Pair(f"{name}/{row}", Picture(str(row), b""), (f"thing{row}", f"a thing{row}")) for row in range(number)]
    rows, draw = judged(name, pairs), np.random.default_rng(number)
    images, texts, own = (draw.standard_normal((count, 8)) for count in (number, 2 * number, 2 * number))
    images, texts, own = (
        (part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32) for part in (images, texts, own)
    )
    return evaluate_query_side(rows, own, "s", teacher=Embedded(images, texts, "t"), factory="Flat", ks=(5, 10))


def test_a_student_without_pictures_is_told_by_its_queries_on_the_teachers_vectors(report):
    retrieval = asked_of_the_teacher("test", 12)
    tables = result_tables(retrieval)
    forward, back = (next(t for t in tables if t.direction == name) for name in ("text_to_image", "image_to_text"))
    assert (forward.student, back.student) == ("student_query_teacher_index", "teacher_query_student_index")
    assert [line.label for line in back.lines][2:] == [
        "teacher's queries, student's vectors",
        "teacher's queries, student's Flat",
    ]
    report["evaluation"] = retrieval.to_json()
    report["sizes"]["part"] = "text tower"
    first = headline(report, tables)[0]
    kept = forward.cell("retention", "student_query_teacher_index")
    assert kept.text in first
    assert "5.0× fewer parameters in its text tower" in first
    assert comparisons(report)[0].name == "parameters of the text tower"
    shown = strips_of(retrieval, forward.set)
    assert len(shown) == len({row.query for row in retrieval.queries(set=forward.set, direction="text_to_image")})
    assert savings(report) == []


def test_what_is_saved_in_sentences(report):
    small, large = {"parameters": 2_600_000, "megabytes": 10.4}, {"parameters": 28_000_000, "megabytes": 112.0}
    report["saves"] = {
        "pictures_not_embedded_again": 12_345,
        "seconds_not_spent": 190.0,
        "text_tower": {"teacher": large, "student": small},
        "texts_per_s_ratio": 23.9,
        "picture_parameters_not_loaded": 3_400_000,
    }
    assert savings(report) == [
        "The teacher's index stays as it is: 12,345 pictures are not embedded again (3 min 10 s at the teacher's own "
        "rate).",
        "Queries need the student's text tower alone: 2.6 M parameters, 10.4 MB, where the teacher's has 28 M, "
        "112 MB; it embeds 23.9× the texts per second.",
        "The teacher's picture tower (3.4 M parameters) is needed for new pictures only.",
    ]
    report["saves"] |= {"seconds_not_spent": None, "texts_per_s_ratio": None, "picture_parameters_not_loaded": None}
    report["saves"]["text_tower"]["teacher"] = {"parameters": None, "megabytes": None}
    assert savings(report) == [
        "The teacher's index stays as it is: 12,345 pictures are not embedded again.",
        "Queries need the student's text tower alone: 2.6 M parameters, 10.4 MB.",
        "No picture tower is loaded to ask; new pictures are embedded by whoever embedded the others.",
    ]
