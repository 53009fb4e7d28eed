"""A run's classification arranged for reading: sentences, tables and the reliability diagram."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from clipdistill.report.panel import SOFT, STUDENT, TEACHER, Drawing, drawing, panel
from clipdistill.report.tables import MISSING, Cell, decimal, share

LISTED = 30
"""So many classes are shown on the page; the report's JSON has them all."""
MEASURES: Mapping[str, str] = {
    "top-1, top-5": "the share of pictures whose label is the likeliest class, or among the five likeliest",
    "ECE": "expected calibration error: how far the probabilities are from the shares that are right; 0 is perfect",
    "agreement": "the share of pictures for which teacher and student have the same likeliest class, right or wrong",
    "retention": "the student's top-1 divided by the teacher's, with its 95% paired bootstrap interval",
    "KL": "the mean divergence of the student's class probabilities from the teacher's, in nats",
}
"""What each measure is, in a line."""


@dataclass(frozen=True, slots=True)
class ClassRow:
    """Both models in one measure.

    Attributes:
        name: The measure.
        teacher: The teacher's value; empty where the measure is of both together.
        student: The student's, or of both together.
    """

    name: str
    teacher: Cell
    student: Cell


@dataclass(frozen=True, slots=True)
class ClassTable:
    """One evaluation set.

    Attributes:
        set: Its name.
        protocol: Pictures and classes in words.
        rows: The measures.
        shown: The classes on which the student loses most, at most :data:`LISTED`; plain values as in the report.
        hidden: How many classes are not shown.
        diagram: The reliability of both.
    """

    set: str
    protocol: str
    rows: tuple[ClassRow, ...]
    shown: tuple[Mapping[str, Any], ...]
    hidden: int
    diagram: Drawing


_NOTHING = Cell("", "", None)


def class_tables(report: Mapping[str, Any]) -> list[ClassTable]:
    """The tables of a run's classification; none where the run had another task."""
    return [_table(one) for one in (report.get("classification") or {}).get("sets", ())]


def class_headline(report: Mapping[str, Any]) -> list[str]:
    """What the classification came to: a sentence for each set."""
    return [_sentence(one) for one in (report.get("classification") or {}).get("sets", ())]


def reliability_diagram(title: str, sides: Mapping[str, Sequence[Mapping[str, Any]]]) -> Drawing:
    """How often each model is right over how sure it is; on the diagonal it knows how much it knows.

    Source: DeGroot, Fienberg 1983, as used by Guo et al. 2017, arXiv 1706.04599.

    Args:
        title: What it is measured on.
        sides: ``teacher`` and ``student``: the bins of each, as in the report.
    """
    with panel(4.4, 2.9, left=0.11, right=0.97) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=SOFT, linestyle=(0, (4, 3)), linewidth=1.2)
        for who, colour in (("teacher", TEACHER), ("student", STUDENT)):
            points = [(one["confidence"], one["accuracy"]) for one in sides[who] if one["pictures"]]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=5, label=who)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="probability of the likeliest class", ylabel="share right")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        axes.legend(loc="upper left", borderaxespad=0.2, labelspacing=0.3)
        words = "; ".join(f"{who}: {_bins_in_words(bins)}" for who, bins in sides.items())
        return drawing(figure, title, words)


def _bins_in_words(bins: Sequence[Mapping[str, Any]]) -> str:
    filled = [one for one in bins if one["pictures"]]
    return ", ".join(f"{share(one['accuracy'])} right at {share(one['confidence'])}" for one in filled)


def _table(found: Mapping[str, Any]) -> ClassTable:
    lines = sorted(found["per_class"], key=lambda line: (line["student"] - line["teacher"], line["label"]))
    name = found["set"]
    return ClassTable(
        set=name,
        protocol=f"{found['pictures']:,} pictures, {found['classes']:,} classes to choose from",
        rows=tuple(_rows(found)),
        shown=tuple(lines[:LISTED]),
        hidden=max(0, len(lines) - LISTED),
        diagram=reliability_diagram(
            f"{name}: reliability", {who: found[who]["bins"] for who in ("teacher", "student")}
        ),
    )


def _rows(found: Mapping[str, Any]) -> Iterator[ClassRow]:
    teacher, student = found["teacher"], found["student"]
    for name, field in (("top-1", "top1"), ("top-5", "top5")):
        yield ClassRow(name, _estimate(teacher[field]), _estimate(student[field]))
    yield ClassRow("ECE", _plain(decimal(teacher["ece"])), _plain(decimal(student["ece"])))
    yield ClassRow("agreement", _NOTHING, _estimate(found["agreement"]))
    yield ClassRow("retention of top-1", _NOTHING, _estimate(found["retention"]))
    yield ClassRow("KL", _NOTHING, _plain(decimal(found["divergence"])))


def _estimate(found: Mapping[str, Any]) -> Cell:
    text = share(found["value"])
    known = text != MISSING and found["low"] is not None and found["high"] is not None
    interval = f"[{share(found['low']).rstrip('%')}, {share(found['high']).rstrip('%')}]" if known else ""
    return Cell(text, interval, found["value"])


def _plain(text: str) -> Cell:
    return Cell(text, "", None)


def _sentence(found: Mapping[str, Any]) -> str:
    kept, agreed = _estimate(found["retention"]), _estimate(found["agreement"])
    teacher, student = (share(found[who]["top1"]["value"]) for who in ("teacher", "student"))
    return (
        f"The student keeps {' '.join(filter(None, (kept.text, kept.interval)))} of the teacher's top-1 on "
        f"“{found['set']}” ({student} of {teacher}), and has the teacher's class for {agreed.text} of the pictures."
    )
