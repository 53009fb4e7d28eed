"""The recall budget of a compressed student: a table for each set, a sentence, and retention against bytes a vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from rich.table import Table
from rich.text import Text

from clipdistill.report.panel import CYCLE, Drawing, drawing, panel
from clipdistill.report.tables import MISSING, amount, count, decimal, share

_WIDE, _HIGH = 5.4, 3.0


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """One step.

    Attributes:
        name: The step.
        cells: Its values as text, in the order of the headings.
    """

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BudgetTable:
    """The budget on one set.

    Attributes:
        set: The set's name.
        protocol: How many queries among how many vectors.
        lines: The steps.
    """

    set: str
    protocol: str
    lines: tuple[BudgetLine, ...]


@dataclass(frozen=True, slots=True)
class CompressionSection:
    """What the page shows of a compression.

    Attributes:
        finding: What was chosen, or by how much all miss the target.
        headings: The columns' names.
        tables: A table for each set.
        curve: Retention against bytes a vector; None where nothing can be drawn.
    """

    finding: str
    headings: tuple[str, ...]
    tables: tuple[BudgetTable, ...]
    curve: Drawing | None


def compression_section(budget: Mapping[str, Any]) -> CompressionSection:
    """The page's section of a recall budget.

    Args:
        budget: The values of ``budget.json``, schema ``clipdistill.recall-budget/1``.
    """
    return CompressionSection(finding(budget), _headings(budget["k"]), _tables(budget), compression_curve(budget))


def budget_summary(budget: Mapping[str, Any]) -> list[Table | Text | str]:
    """The budget for a terminal: a table for each set, and what it comes to in a sentence.

    Args:
        budget: The values of ``budget.json``, schema ``clipdistill.recall-budget/1``.
    """
    found: list[Table | Text | str] = []
    for table in _tables(budget):
        shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        shown.add_column("", no_wrap=True)
        for heading in _headings(budget["k"]):
            shown.add_column(heading, justify="right", no_wrap=True)
        for line in table.lines:
            shown.add_row(Text(line.name), *map(Text, line.cells))
        found += [Text(f"{table.set}: {table.protocol}", style="bold"), shown, ""]
    found += [Text(f"left out: {reason}") for reason in budget["left_out"]]
    return [*found, Text(finding(budget))]


def finding(budget: Mapping[str, Any]) -> str:
    """What was chosen, or by how much all miss the target, in a sentence or two."""
    one, target = budget["chosen"], budget["target"]
    bounds = [f"{share(target['retention'])} of the {target['of']}'s success@{budget['k']}"]
    bounds += [f"{target['megabytes']:g} megabytes"] if target["megabytes"] is not None else []
    bounds += [f"{target['bytes_per_vector']:g} bytes a vector"] if target["bytes_per_vector"] is not None else []
    width = f"{one['dim']} wide" if one["rotation"] == "whole" else f"cut to {one['dim']} ({one['rotation']})"
    what = (
        f"{width}, {one['factory']}: retention {decimal(one['retention'])} on val, "
        f"{amount(one['bytes_per_vector'])} bytes a vector, {amount(one['megabytes'])} megabytes"
    )
    tried = f"{len(budget['candidates'])} combinations"
    if budget["met"]:
        return f"The smallest of {tried} that keeps the target ({', '.join(bounds)}) is {what}."
    says = budget["missed"]["says"]
    return f"None of {tried} keeps the target ({', '.join(bounds)}). The nearest is {what}; it is {says}."


def compression_curve(budget: Mapping[str, Any]) -> Drawing | None:
    """Retention of the teacher's success over bytes a vector, of the combinations that none beats on ``val``.

    Args:
        budget: The values of ``budget.json``.

    Returns:
        The figure, a line for each set; None where no set has a retention.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in budget["curve"]:
        if point["retention"] is not None:
            lines.setdefault(point["set"], []).append((point["bytes_per_vector"], point["retention"]))
    if not lines:
        return None
    with panel(_WIDE, _HIGH, left=0.12, right=0.97) as (figure, axes):
        for place, (name, points) in enumerate(lines.items()):
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=CYCLE[place % len(CYCLE)], marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("bytes a vector")
        axes.legend(loc="lower right")
        words = "; ".join(_words(name, points) for name, points in lines.items())
        title = f"Retention of the teacher's success@{budget['k']} against bytes a vector"
        return drawing(figure, title, words)


def _words(name: str, points: Sequence[tuple[float, float]]) -> str:
    return f"{name}: " + ", ".join(f"{decimal(kept)} at {amount(size)} bytes" for size, kept in points)


def _headings(k: int) -> tuple[str, ...]:
    return (f"success@{k}", "lost", "kept", "retention", f"overlap@{k}", "bytes", "MB")


def _tables(budget: Mapping[str, Any]) -> tuple[BudgetTable, ...]:
    names = dict.fromkeys(row["set"] for row in budget["rows"])
    return tuple(_table(name, [row for row in budget["rows"] if row["set"] == name]) for name in names)


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> BudgetTable:
    protocol = f"{count(rows[0]['queries'])} texts among {count(rows[0]['gallery'])} pictures"
    return BudgetTable(name, protocol, tuple(BudgetLine(row["step"], _cells(row)) for row in rows))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        decimal(row["success"]),
        decimal(row["lost"]),
        _with_interval(row, "kept"),
        _with_interval(row, "retention"),
        decimal(row["overlap"]),
        amount(row["bytes_per_vector"]),
        amount(row["megabytes"]),
    )


def _with_interval(row: Mapping[str, Any], field: str) -> str:
    if row[field] is None:
        return MISSING
    return f"{share(row[field])} [{share(row[f'{field}_low'])}, {share(row[f'{field}_high'])}]"
