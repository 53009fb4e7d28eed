"""The report page: one HTML file that holds everything it shows, needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clipdistill.core import files
from clipdistill.data.records import Picture
from clipdistill.evaluation import RetrievalReport
from clipdistill.report import tables
from clipdistill.report.classes import MEASURES as CLASS_MEASURES
from clipdistill.report.classes import class_headline, class_tables
from clipdistill.report.compression import compression_section
from clipdistill.report.figures import Size, recall_budget, size_against_recall, training_curves
from clipdistill.report.members import member_headings, member_tables
from clipdistill.report.panel import Drawing
from clipdistill.report.strips import SHOWN, Choice, choose, strips_of, thumbnails
from clipdistill.report.tables import QUERY_SIDE, STUDENT, TEACHER, TEXT_SIDE, TEXT_TO_IMAGE, ResultTable

_TEMPLATE = "page.html.j2"
_BUDGET = (
    ("teacher, exact search", TEACHER, "exact"),
    ("student's queries, teacher's vectors", QUERY_SIDE, "exact"),
    ("student, exact search", STUDENT, "exact"),
    ("student, through the index", STUDENT, "index"),
)
_WITH_TEACHER = (
    ("student's queries, teacher's index", QUERY_SIDE, "index"),
    ("teacher's queries, student's vectors", TEXT_SIDE, "exact"),
    ("teacher's queries, student's index", TEXT_SIDE, "index"),
)
"""The further steps where the student has no picture tower."""
# Characters that HTML forbids even escaped; a caption may hold them.
_FORBIDDEN = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "�")


@dataclass(frozen=True, slots=True)
class Tile:
    """One large number at the page's head.

    Attributes:
        value: The number as text.
        name: What it is.
        note: What it was measured on, or its interval.
    """

    value: str
    name: str
    note: str


def write_report(
    path: Path,
    report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Picture],
    *,
    strips: int,
    budget: Mapping[str, Any] | None = None,
) -> None:
    """Write the page of a run: the same inputs give the same bytes.

    Args:
        path: The HTML file.
        report: The run's report, schema ``clipdistill.run-report/1``.
        metrics: The lines of the training's ``metrics.jsonl``; none where there was no training.
        pictures: The pictures by key; only those that are shown are read, and a placeholder stands for one that is
            missing or cannot be decoded.
        strips: How many of the best and of the worst queries of each set are shown with their pictures.
        budget: The compression's ``budget.json``, schema ``clipdistill.recall-budget/1``; None where there is none.

    Raises:
        MismatchError: If the report's ``evaluation`` is of another schema.
    """
    files.write_text(path, render(report, metrics, pictures, strips=strips, budget=budget))


def render(
    report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Picture],
    *,
    strips: int,
    budget: Mapping[str, Any] | None = None,
) -> str:
    """The page that :func:`write_report` writes, as text."""
    retrieval = RetrievalReport.from_json(report["evaluation"])
    results = tables.result_tables(retrieval)
    sets = list(dict.fromkeys(table.set for table in results))
    choices = {name: choose(strips_of(retrieval, name), strips) for name in sets}
    shown = thumbnails(_shown_keys(choices.values()), pictures)
    page = (
        environment()
        .get_template(_TEMPLATE)
        .render(
            report=report,
            headline=[*class_headline(report), *tables.headline(report, results)],
            tiles=_tiles(report, results),
            sets={name: [table for table in results if table.set == name] for name in sets},
            measures=tables.MEASURES,
            classified=class_tables(report),
            class_measures=CLASS_MEASURES,
            budgets=_budgets(results),
            compression=None if budget is None else compression_section(budget),
            sizes=_size_figure(report, results),
            teacher=tables.both(report, "sizes")[0].get("name") or TEACHER,
            comparisons=tables.comparisons(report),
            members=member_tables(report, results),
            member_headings=member_headings,
            savings=tables.savings(report),
            curves=training_curves(metrics),
            choices={name: choice for name, choice in choices.items() if choice.best or choice.worst},
            shown_hits=SHOWN,
            data_sets=_in_order((report.get("data") or {}).get("sets") or {}),
            pictures={key: number for number, key in enumerate(shown)},
            sources=[Markup(source) for source in shown.values()],
            protocol=retrieval.protocol,
        )
    )
    return only_allowed(page)


def only_allowed(page: str) -> str:
    """A page with a placeholder for each character that no HTML may hold; a caption may have any."""
    return page.encode("utf-8", "replace").decode("utf-8").translate(_FORBIDDEN)


def environment() -> Environment:
    """The templates' environment: every value is escaped, and one that is missing is a fault."""
    made = Environment(
        loader=PackageLoader("clipdistill.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(decimal=tables.decimal, share=tables.share, count=tables.count, shorten=_shorten)
    made.filters.update(inline=_inline, heading=tables.heading)
    return made


def _inline(drawing: Drawing) -> Markup:
    """A figure's SVG, which :mod:`clipdistill.report.figures` has escaped."""
    return Markup(drawing.svg)


def _shorten(text: Any, most: int) -> str:
    """A text that may be endless, cut after ``most`` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def _in_order(sets: Iterable[str]) -> list[str]:
    """The sets' names: what was trained on, what chose the student, and the others by name."""
    return sorted(sets, key=lambda name: (name != "train", name != "val", name))


def _shown_keys(choices: Iterable[Choice]) -> list[str]:
    strips = [strip for choice in choices for strip in (*choice.best, *choice.worst)]
    return [hit.key for strip in strips for hit in (*strip.teacher, *strip.student)]


def _tiles(report: Mapping[str, Any], results: Sequence[ResultTable]) -> list[Tile]:
    """The figures that decide: what is kept on the hardest set, and what it costs no more."""
    found = []
    table = next((table for table in results if table.direction == TEXT_TO_IMAGE), None)
    if table is not None:
        kept, overlap = table.cell("retention", table.student), table.cell("overlap", table.student)
        found.append(
            Tile(kept.text, f"of the teacher's success@{table.k} kept", f"{kept.interval} on “{table.set}”".strip())
        )
        found.append(
            Tile(tables.share(overlap.value), f"of the teacher's top {table.k} returned too", f"on “{table.set}”")
        )
    sizes, speeds = tables.both(report, "sizes"), tables.both(report, "speeds")
    smaller = tables.ratio(*sizes, "parameters")
    if smaller is not None and smaller >= 1:
        part = (report.get("sizes") or {}).get("part")
        what = f"fewer parameters in the {part}" if part else "fewer parameters"
        found.append(Tile(tables.times(smaller), what, "teacher ÷ student"))
    for field, unit in (("images_per_s", "pictures"), ("texts_per_s", "texts")):
        faster = tables.times(tables.ratio(*speeds[::-1], field))
        found.append(Tile(faster, f"{unit} a second", "student ÷ teacher"))
    return [tile for tile in found if tile.value != tables.MISSING]


def _budgets(results: Sequence[ResultTable]) -> list[Drawing]:
    """A figure for each set and direction: success from the teacher down to the student's index."""
    drawings = []
    for table in results:
        budget = _BUDGET if table.student == STUDENT else (*_BUDGET, *_WITH_TEACHER)
        steps = [(name, table.cell("success", pairing, search).value) for name, pairing, search in budget]
        drawing = recall_budget(f"{table.set}: {table.title.lower()}, success@{table.k}", steps)
        if drawing is not None:
            drawings.append(drawing)
    return drawings


def _size_figure(report: Mapping[str, Any], results: Sequence[ResultTable]) -> Drawing | None:
    asked = [table for table in results if table.direction == TEXT_TO_IMAGE]
    if not asked:
        return None
    sizes = report.get("sizes") or {}
    models = []
    for who in (TEACHER, STUDENT):
        facts = sizes.get(who) or {}
        reached = {table.set: table.cell("success", who if who == TEACHER else table.student).value for table in asked}
        models.append(Size(who, facts.get("parameters"), facts.get("megabytes"), reached))
    return size_against_recall(models, asked[0].k)
