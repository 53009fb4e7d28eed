from __future__ import annotations

import io

from rich.console import Console

from clipdistill.report.tables import headline, result_tables
from clipdistill.report.terminal import summary


def printed(report, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, soft_wrap=True)
    for item in summary(report):
        console.print(item)
    return console.file.getvalue()


def test_each_value_is_printed_whole_on_80_columns(report, retrieval):
    text = printed(report)
    assert "…" not in text
    table = result_tables(retrieval)[0]
    line = next(line for line in table.lines if (line.pairing, line.search) == ("student", "exact"))
    cells = dict(zip(table.columns, line.cells, strict=True))
    row = next(row for row in text.splitlines() if row.startswith("student  "))
    wanted = [cells["success", 1], cells["success", 5], cells["success", 10], cells["overlap", 10]]
    kept = cells["retention", 10]
    assert row.split() == ["student", *(cell.text for cell in wanted), kept.text, *kept.interval.split()]


def test_sizes_speeds_and_the_headline_are_printed(report, retrieval):
    text = printed(report)
    assert text.count("text queries, each against") == 2
    assert ["parameters", "28.4", "M", "5.68", "M", "5.0×"] in [line.split() for line in text.splitlines()]
    for sentence in headline(report, result_tables(retrieval)):
        assert sentence in text


def test_brackets_in_names_are_not_markup(report):
    for row in report["evaluation"]["rows"]:
        row["set"] = f"[red]{row['set']}[/red]"
    assert "[red]unseen[/red]: text → picture" in printed(report)


def test_a_report_of_next_to_nothing(report):
    empty = {"schema": report["evaluation"]["schema"], "rows": [], "per_query": [], "protocol": []}
    assert "n/a" in printed({"evaluation": empty})
