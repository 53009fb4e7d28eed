"""The summary at the end of a run, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from clipdistill.evaluation import RetrievalReport
from clipdistill.report import tables
from clipdistill.report.classes import ClassTable, class_headline, class_tables
from clipdistill.report.members import MemberTable, member_headings, member_tables
from clipdistill.report.tables import EXACT, QUERY_SIDE, STUDENT, TEACHER, TEXT_SIDE, Cell, Line, ResultTable

_LEFT_TO_THE_PAGE = ("recall", "rbo", "teacher_top1")
_NAMES = {TEACHER: "teacher", QUERY_SIDE: "student on teacher", TEXT_SIDE: "teacher on student", STUDENT: "student"}
_NOTE = "student on teacher: the student's queries against the teacher's vectors; index: through FAISS; else exact"


def summary(report: Mapping[str, Any]) -> list[Table | Text | str]:
    """A table for each set and direction, sizes and speeds, and what it comes to in a sentence or two.

    Args:
        report: The run's report, schema ``clipdistill.run-report/1``.

    Returns:
        Things that ``rich`` prints, in order; nothing in them is read as markup.
    """
    results = tables.result_tables(RetrievalReport.from_json(report["evaluation"]))
    found: list[Table | Text | str] = []
    for table in results:
        title = f"{table.set}: {table.title.lower()}, {table.protocol}"
        found += [Text(title, style="bold"), _results(table), ""]
    if results:
        found += [_NOTE, ""]
    for members in member_tables(report, results):
        found += [Text(f"{members.set}: {members.title.lower()}, the teachers", style="bold"), _members(members)]
        found += [Text(members.finding), ""] if members.finding else [""]
    for classified in class_tables(report):
        title = f"{classified.set}: classification, {classified.protocol}"
        found += [Text(title, style="bold"), _classification(classified), ""]
    sentences = [*class_headline(report), *tables.headline(report, results), *tables.savings(report)]
    return [*found, _comparison(report), "", *map(Text, sentences)]


def _classification(table: ClassTable) -> Table:
    shown = _table(["teacher", "student"])
    for row in table.rows:
        shown.add_row(row.name, *(Text(f"{cell.text} {cell.interval}".strip()) for cell in (row.teacher, row.student)))
    return shown


def _results(table: ResultTable) -> Table:
    columns = [place for place, (measure, _) in enumerate(table.columns) if measure not in _LEFT_TO_THE_PAGE]
    shown = _table([tables.heading(*table.columns[place]).replace("@", "\n@") for place in columns])
    for line in table.lines:
        cells = [_cell(line.cells[place], table.columns[place][0]) for place in columns]
        shown.add_row(
            _name(line), *cells, style="bold" if (line.pairing, line.search) == (table.student, EXACT) else ""
        )
    return shown


def _name(line: Line) -> Text:
    whole, _, width = line.pairing.partition("@")
    name = _NAMES.get(whole, whole)
    if width:
        name = name.replace("student", f"student@{width}", 1)
    return Text(name if line.search == EXACT else f"{name}, index")


def _cell(cell: Cell, measure: str) -> Text:
    return Text(f"{cell.text} {cell.interval}".strip() if measure == "retention" else cell.text)


def _members(table: MemberTable) -> Table:
    headings = member_headings(table.k)
    columns = [headings.index(name) for name in ("weight", f"success@{table.k}", "of the ensemble's")]
    shown = _table([headings[place] for place in columns])
    for line in table.lines:
        success, kept, overlap = line.cells
        texts = [*line.facts, success.text, f"{kept.text} {kept.interval}".strip(), overlap.text]
        shown.add_row(Text(line.name), *(Text(texts[place]) for place in columns))
    return shown


def _comparison(report: Mapping[str, Any]) -> Table:
    shown = _table(["teacher", "student", "ratio"])
    for row in tables.comparisons(report):
        shown.add_row(row.name, row.teacher, row.student, row.ratio)
    return shown


def _table(headings: Sequence[str]) -> Table:
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    shown.add_column("", no_wrap=True)
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    return shown
