"""The recall budget of a compressed student: a table for each set, sentences, and retention against bytes a vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from rich.table import Table
from rich.text import Text

from clipdistill.report.panel import CYCLE, INK, Drawing, drawing, panel
from clipdistill.report.tables import MISSING, amount, count, decimal, share

_WIDE, _HIGH = 10.6, 3.6
_MARKS: Mapping[str, tuple[str, Literal["-", "-.", "--"]]] = {
    "fp32": ("o", "-"),
    "fp16": ("^", "-."),
    "int8": ("s", "--"),
}
"""The mark and the line of each precision."""
_VAL = "val"


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
        losses: Where the recall was lost, a sentence for each set.
        headings: The columns' names.
        tables: A table for each set.
        curve: Retention against bytes a vector; None where nothing can be drawn.
    """

    finding: str
    losses: tuple[str, ...]
    headings: tuple[str, ...]
    tables: tuple[BudgetTable, ...]
    curve: Drawing | None


def compression_section(budget: Mapping[str, Any]) -> CompressionSection:
    """The page's section of a recall budget.

    Args:
        budget: The values of ``budget.json``, schema ``clipdistill.recall-budget/2``.
    """
    return CompressionSection(
        finding(budget), losses(budget), _headings(budget["k"]), _tables(budget), compression_curve(budget)
    )


def budget_summary(budget: Mapping[str, Any]) -> list[Table | Text | str]:
    """The budget for a terminal: a table for each set, and what it comes to in sentences.

    Args:
        budget: The values of ``budget.json``, schema ``clipdistill.recall-budget/2``.
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
    return [*found, *map(Text, losses(budget)), Text(finding(budget))]


def finding(budget: Mapping[str, Any]) -> str:
    """What was chosen, or by how much all miss the target, in a sentence or two."""
    one, target = budget["chosen"], budget["target"]
    bounds = [f"{share(target['retention'])} of the {target['of']}'s success@{budget['k']}"]
    bounds += [f"{target['megabytes']:g} megabytes"] if target["megabytes"] is not None else []
    bounds += [f"{target['bytes_per_vector']:g} bytes a vector"] if target["bytes_per_vector"] is not None else []
    what = (
        f"{_combination(one)}: as it is exported, retention {decimal(one['retention'])} on val, "
        f"{amount(one['bytes_per_vector'])} bytes a vector, {amount(one['megabytes'])} megabytes of towers"
    )
    tried = f"{len(budget['candidates'])} combinations"
    failed = sum(not attempt["met"] for attempt in budget["attempts"])
    if budget["met"]:
        smaller = f" {_smaller(failed)} in the search, and did not once exported." if failed else ""
        return f"The smallest of {tried} that keeps the target ({', '.join(bounds)}) is {what}.{smaller}"
    says = budget["missed"]["says"]
    return f"None of {tried} keeps the target ({', '.join(bounds)}). The nearest is {what}; it is {says}."


def losses(budget: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the recall was lost, a sentence for each set but the one that the choice was made on, if there are more."""
    found = budget["most_lost"]
    names = [name for name in found if name != _VAL] or list(found)
    return tuple(_loss(name, found[name], budget["k"]) for name in names)


def _loss(name: str, most: Mapping[str, Any] | None, k: int) -> str:
    if most is None:
        return f"On {name} no step loses any success@{k}."
    return f"On {name} most recall is lost at the step “{most['step']}”: {decimal(most['lost'])} of success@{k}."


def _combination(one: Mapping[str, Any]) -> str:
    pruned = f"{one['share']:.0%} of the channels, " if one["share"] < 1 else ""
    width = f"{one['dim']} wide" if one["rotation"] == "whole" else f"cut to {one['dim']} ({one['rotation']})"
    return f"{pruned}{width}, {one['precision']} graphs, {one['factory']}"


def _smaller(failed: int) -> str:
    return "1 smaller one kept it" if failed == 1 else f"{failed} smaller ones kept it"


def compression_curve(budget: Mapping[str, Any]) -> Drawing | None:
    """Retention of the teacher's success over bytes a vector, of the combinations that none beats on ``val``.

    Args:
        budget: The values of ``budget.json``.

    Returns:
        The figure, a line for each set and precision; None where no set has a retention.
    """
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for point in budget["curve"]:
        if point["retention"] is not None:
            at = (point["bytes_per_vector"], point["retention"])
            lines.setdefault((point["set"], point["precision"]), []).append(at)
    if not lines:
        return None
    colours = dict(zip(dict.fromkeys(name for name, _ in lines), [*CYCLE, *CYCLE], strict=False))
    with panel(_WIDE, _HIGH, left=0.06, right=0.985) as (figure, axes):
        for (name, precision), points in lines.items():
            xs, ys = zip(*points, strict=True)
            mark, dash = _MARKS[precision]
            axes.plot(xs, ys, color=colours[name], marker=mark, linestyle=dash, markersize=4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(5))
        lowest = min(kept for points in lines.values() for _, kept in points)
        axes.set_ylim(bottom=max(0.0, math.floor(10 * lowest - 1) / 10))  # nearly flat from 0 on
        axes.set_xlabel("bytes a vector")
        axes.legend(handles=_handles(colours, [precision for _, precision in lines]), loc="lower right", ncols=2)
        words = "; ".join(_words(f"{name}, {precision}", points) for (name, precision), points in lines.items())
        title = f"Retention of the teacher's success@{budget['k']} against bytes a vector"
        return drawing(figure, title, words)


def _handles(colours: Mapping[str, str], precisions: Sequence[str]) -> list[Line2D]:
    """What a colour and what a mark stands for."""
    sets = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    marks = [(name, *_MARKS[name]) for name in dict.fromkeys(precisions)]
    return [
        *sets,
        *(
            Line2D([], [], color=INK, marker=mark, linestyle=dash, markersize=4, label=name)
            for name, mark, dash in marks
        ),
    ]


def _words(name: str, points: Sequence[tuple[float, float]]) -> str:
    return f"{name}: " + ", ".join(f"{decimal(kept)} at {amount(size)} bytes" for size, kept in points)


def _headings(k: int) -> tuple[str, ...]:
    return (f"success@{k}", "lost", "kept", "retention", f"overlap@{k}", "bytes", "MB", "pictures/s", "texts/s")


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
        amount(row["images_per_s"]),
        amount(row["texts_per_s"]),
    )


def _with_interval(row: Mapping[str, Any], field: str) -> str:
    if row[field] is None:
        return MISSING
    low, high = row[f"{field}_low"], row[f"{field}_high"]
    return share(row[field]) if low == high else f"{share(row[field])} [{100 * low:.1f}, {100 * high:.1f}]"
