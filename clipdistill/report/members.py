"""The teachers of an ensemble beside the whole: whether it is better than its best member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipdistill.evaluation import ReportRow
from clipdistill.report.tables import TEACHER, Cell, ResultTable, cell_of, count, decimal, millions

ENSEMBLE = "all together"
_COLUMNS = ("success", "retention", "overlap")
_BLANK = Cell("", "", None)


@dataclass(frozen=True, slots=True)
class MemberLine:
    """One teacher, or all of them together.

    Attributes:
        name: Which.
        facts: Its weight, scale, width and parameters as text.
        cells: Its success, its success against the ensemble's, and its overlap with the ensemble's ranking.
    """

    name: str
    facts: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class MemberTable:
    """The teachers on one evaluation set in one direction.

    Attributes:
        set: The set's name.
        title: The direction in words.
        k: The cut-off.
        lines: The ensemble, then its members.
        finding: Whether the ensemble is better than its best member, in a sentence; empty without ground truth.
    """

    set: str
    title: str
    k: int
    lines: tuple[MemberLine, ...]
    finding: str


def member_headings(k: int) -> tuple[str, ...]:
    """The columns' names, after the teacher's own."""
    return "weight", "scale", "width", "parameters", f"success@{k}", "of the ensemble's", f"overlap@{k}"


def member_tables(report: Mapping[str, Any], tables: Sequence[ResultTable]) -> list[MemberTable]:
    """A table for each set and direction; none where the run has one teacher.

    Args:
        report: The run's report, schema ``clipdistill.run-report/1``.
        tables: Its results.
    """
    members = report.get("members") or []
    return [_table(table, report, members) for table in tables] if members else []


def _table(table: ResultTable, report: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> MemberTable:
    whole = (report.get("sizes") or {}).get(TEACHER) or {}
    facts = ("", "", count(whole.get("dim")), millions(whole.get("parameters")))
    success = table.cell("success", TEACHER)
    lines = [MemberLine(ENSEMBLE, facts, (success, _BLANK, _BLANK))]
    lines += [_line(member, table) for member in members]
    return MemberTable(table.set, table.title, table.k, tuple(lines), _finding(table, members))


def _line(member: Mapping[str, Any], table: ResultTable) -> MemberLine:
    facts = (
        decimal(member.get("weight"), 2),
        decimal(member.get("scale"), 1),
        count(member.get("dim")),
        millions(member.get("parameters")),
    )
    return MemberLine(str(member["name"]), facts, tuple(cell_of(_row(member, table, name)) for name in _COLUMNS))


def _row(member: Mapping[str, Any], table: ResultTable, measure: str) -> ReportRow | None:
    for row in member["rows"]:
        if (row["set"], row["direction"], row["measure"], row["k"]) == (table.set, table.direction, measure, table.k):
            return ReportRow(**row)
    return None


def _finding(table: ResultTable, members: Sequence[Mapping[str, Any]]) -> str:
    measured = [(row.value, member) for member in members if (row := _row(member, table, "success")) and row.value]
    if not measured:
        return ""
    reached, best = max(measured, key=lambda pair: pair[0])
    kept = _row(best, table, "retention")
    low, high = (kept.low, kept.high) if kept else (None, None)
    if high is not None and high < 1:
        verdict = "better than its best member"
    elif low is not None and low > 1:
        verdict = "worse than its best member: distil from that one alone, or weigh it more"
    else:
        verdict = "neither better nor worse than its best member, as far as these queries can tell"
    whole, share = table.cell("success", TEACHER), cell_of(kept)
    return (
        f"{table.title} on “{table.set}”: the ensemble is {verdict}. success@{table.k} {whole.text}; {best['name']} "
        f"alone {decimal(reached)}, {share.text}{share.interval and ' '}{share.interval} of the ensemble's."
    )
