"""A run's report arranged for reading: tables, sentences and numbers as text. The page and the terminal share it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipdistill.core.progress import duration
from clipdistill.evaluation import ReportRow, RetrievalReport

MISSING = "n/a"
EXACT, INDEX_PREFIX = "exact", "index:"
TEACHER, STUDENT, QUERY_SIDE = "teacher", "student", "student_query_teacher_index"
TEXT_SIDE = "teacher_query_student_index"
TEXT_TO_IMAGE = "text_to_image"
DIRECTIONS: Mapping[str, tuple[str, str, str]] = {
    TEXT_TO_IMAGE: ("Text → picture", "text", "pictures"),
    "image_to_text": ("Picture → text", "picture", "texts"),
    "image_to_image": ("Picture → picture", "picture", "pictures"),
}
"""For each direction its title, what a query is, and what the gallery holds."""

MEASURES: Mapping[str, str] = {
    "success": "a relevant item is among the first k: what CLIP papers print as R@k",
    "recall": "the share of all relevant items that is among the first k",
    "overlap": "the share of the teacher's first k that the student returns too",
    "teacher_top1": "the teacher's first hit is among the student's first k",
    "rbo": "rank-biased overlap: agreement of the two rankings, the top counting most",
    "retention": "the student's success@k divided by the teacher's, with its 95% paired bootstrap interval",
}
"""What each measure is, in a line."""

_LABELS: Mapping[tuple[str, bool], str] = {
    (TEACHER, True): "teacher, exact search",
    (TEACHER, False): "teacher, through",
    (QUERY_SIDE, True): "student's queries, teacher's vectors",
    (QUERY_SIDE, False): "student's queries, teacher's",
    (TEXT_SIDE, True): "teacher's queries, student's vectors",
    (TEXT_SIDE, False): "teacher's queries, student's",
    (STUDENT, True): "student, exact search",
    (STUDENT, False): "student, through",
}
_HEADLINE_K = 10
_WIDEST = 1 << 30


@dataclass(frozen=True, slots=True)
class Cell:
    """One measured value.

    Attributes:
        text: The value as text; ``n/a`` where it is not defined.
        interval: Its 95% interval as text; empty where there is none.
        value: The number itself, or None.
    """

    text: str
    interval: str
    value: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """One pairing in one kind of search.

    Attributes:
        label: Which, in words.
        pairing: As in the report's rows.
        search: As in the report's rows.
        cells: A value for each column of the table.
    """

    label: str
    pairing: str
    search: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class ResultTable:
    """One evaluation set in one direction.

    Attributes:
        set: The set's name.
        direction: As in the report's rows.
        title: The direction in words.
        protocol: Queries and gallery in words.
        columns: Measure and cut-off (0 where it has none to show) of each column.
        lines: A line for each pairing and search, the teacher first.
        k: The cut-off that stands for the table in sentences and figures.
    """

    set: str
    direction: str
    title: str
    protocol: str
    columns: tuple[tuple[str, int], ...]
    lines: tuple[Line, ...]
    k: int

    @property
    def student(self) -> str:
        """The pairing that stands for the student: its own, or that with its teacher where it has no picture tower."""
        found = {line.pairing for line in self.lines}
        return next((pairing for pairing in (STUDENT, QUERY_SIDE, TEXT_SIDE) if pairing in found), STUDENT)

    def cell(self, measure: str, pairing: str, search: str = EXACT) -> Cell:
        """One value at the table's cut-off, ``n/a`` where there is none; ``index`` means whichever was measured."""
        for line in self.lines:
            if line.pairing == pairing and (line.search == search or (search == "index" and line.search != EXACT)):
                found = [
                    cell
                    for (name, k), cell in zip(self.columns, line.cells, strict=True)
                    if name == measure and k in (0, self.k)
                ]
                return found[0] if found else _NOTHING
        return _NOTHING


_NOTHING = Cell(MISSING, "", None)


def heading(measure: str, k: int) -> str:
    """A column's name: ``success@10``, ``RBO``."""
    return f"{measure.replace('_', ' ')}@{k}" if k else measure.upper()


def result_tables(report: RetrievalReport) -> list[ResultTable]:
    """The report's rows as tables, one for each set and direction; the set that is hardest for the teacher first."""
    groups: dict[tuple[str, str], list[ReportRow]] = {}
    for row in report.rows:
        groups.setdefault((row.set, row.direction), []).append(row)
    tables = [_table(name, direction, rows) for (name, direction), rows in groups.items()]
    hardness: dict[str, float] = {}
    for table in tables:
        reached = table.cell("success", TEACHER).value
        hardness.setdefault(table.set, math.inf if reached is None else reached)
    return sorted(tables, key=lambda table: hardness[table.set])


def _table(name: str, direction: str, rows: Sequence[ReportRow]) -> ResultTable:
    cutoffs = sorted({row.k for row in rows if row.measure in ("success", "overlap")}) or [_HEADLINE_K]
    k = _HEADLINE_K if _HEADLINE_K in cutoffs else cutoffs[-1]
    columns = [("success", cutoff) for cutoff in cutoffs]
    columns += [("recall", k), ("overlap", k), ("teacher_top1", k), ("rbo", 0), ("retention", k)]
    values = {(row.pairing, row.search, row.measure, 0 if row.measure == "rbo" else row.k): row for row in rows}
    kinds = sorted({(row.pairing, row.search) for row in rows}, key=_place)
    lines = tuple(
        Line(_label(*kind), *kind, tuple(cell_of(values.get((*kind, *column))) for column in columns)) for kind in kinds
    )
    title, query, gallery = DIRECTIONS.get(direction, (direction, "", "items"))
    protocol = f"{rows[0].queries:,} {query} queries, each against {rows[0].gallery:,} {gallery}"
    return ResultTable(name, direction, title, protocol, tuple(columns), lines, k)


def _place(kind: tuple[str, str]) -> tuple[int, int, bool, str]:
    """The order in which recall is lost: teacher, student's queries, student, each the widest first, then its index."""
    order = (TEACHER, QUERY_SIDE, TEXT_SIDE, STUDENT)
    pairing, search = kind
    whole, _, width = pairing.partition("@")
    place = order.index(whole) if whole in order else len(order)
    return place, -int(width) if width.isdigit() else -_WIDEST, search != EXACT, search


def _label(pairing: str, search: str) -> str:
    whole, _, width = pairing.partition("@")
    label = _LABELS.get((whole, search == EXACT), whole.replace("_", " "))
    if width:  # embeddings cut to a width: who asks or answers comes first in the label
        label = label.replace("student", f"student at {width}", 1)
    return label if search == EXACT else f"{label} {search.removeprefix(INDEX_PREFIX)}"


def cell_of(row: ReportRow | None) -> Cell:
    """A measured value as text; ``n/a`` where there is none."""
    if row is None or not _is_number(row.value):
        return _NOTHING
    show = share if row.measure == "retention" else decimal
    has_interval = _is_number(row.low) and _is_number(row.high)
    interval = f"[{show(row.low).rstrip('%')}, {show(row.high).rstrip('%')}]" if has_interval else ""
    return Cell(show(row.value), interval, row.value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def decimal(value: Any, places: int = 3) -> str:
    """A number with a fixed count of decimals; ``n/a`` where it is none."""
    return f"{value:.{places}f}" if _is_number(value) else MISSING


def share(value: Any) -> str:
    """A share as a percentage with one decimal; ``n/a`` where it is none."""
    return f"{100 * value:.1f}%" if _is_number(value) else MISSING


def count(value: Any) -> str:
    """A whole number with thousands set apart; ``n/a`` where it is none."""
    return f"{value:,.0f}" if _is_number(value) else MISSING


def amount(value: Any) -> str:
    """A quantity with three figures or all its whole ones: ``0.52``, ``5.63``, ``41.2``, ``1,234``."""
    if not _is_number(value):
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def millions(value: Any) -> str:
    """A number of parameters: ``28.4 M``; ``n/a`` where it is none."""
    return f"{amount(value / 1e6)} M" if _is_number(value) else MISSING


def times(value: float | None) -> str:
    """A ratio: ``4.7×``; ``n/a`` where it is none."""
    if value is None or not _is_number(value):
        return MISSING
    return f"{value:.1f}×" if 1 <= value < 100 else f"{amount(value)}×"


def ratio(above: Mapping[str, Any], below: Mapping[str, Any], field: str) -> float | None:
    """One value divided by another of the same name; None where either is missing or not above 0."""
    upper, lower = above.get(field), below.get(field)
    if upper is None or lower is None or not (_is_number(upper) and _is_number(lower)) or min(upper, lower) <= 0:
        return None
    return float(upper) / float(lower)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Student and teacher in one quantity.

    Attributes:
        name: The quantity, with its unit.
        teacher: The teacher's value as text.
        student: The student's.
        ratio: How many times better the student is, as text; ``n/a`` where that cannot be said.
    """

    name: str
    teacher: str
    student: str
    ratio: str


def comparisons(report: Mapping[str, Any]) -> list[Comparison]:
    """Sizes and speeds of the student beside the teacher's, from the run's report."""
    sizes, speeds = both(report, "sizes"), both(report, "speeds")
    part = f" of the {report['sizes']['part']}" if (report.get("sizes") or {}).get("part") else ""
    smaller = [(f"parameters{part}", "parameters", millions), ("size in float32, MB", "megabytes", amount)]
    faster = [("pictures a second", "images_per_s"), ("texts a second", "texts_per_s")]
    return [
        *(_compare(name, field, *sizes, ratio(*sizes, field), show) for name, field, show in smaller),
        _compare("embedding width", "dim", *sizes, ratio(*sizes, "dim"), count),
        *(_compare(name, field, *speeds, ratio(*speeds[::-1], field), amount) for name, field in faster),
    ]


def both(report: Mapping[str, Any], section: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The teacher's and the student's part of ``sizes`` or ``speeds``; empty where there is none."""
    values = report.get(section) or {}
    return values.get(TEACHER) or {}, values.get(STUDENT) or {}


def _compare(
    name: str, field: str, teacher: Mapping[str, Any], student: Mapping[str, Any], better: float | None, show: Any
) -> Comparison:
    return Comparison(name, show(teacher.get(field)), show(student.get(field)), times(better))


def headline(report: Mapping[str, Any], tables: Sequence[ResultTable]) -> list[str]:
    """What the run came to, in sentences: the first set's retention with size and speed, then the other sets'.

    Args:
        report: The run's report.
        tables: Its tables.
    """
    kept = [sentence for table in tables if table.direction == TEXT_TO_IMAGE for sentence in _kept(table)]
    gains = list(_gains(report))
    if not kept:
        return [f"The student has {_listed(gains)}."] if gains else []
    first = f"The student keeps {kept[0]}" + (f", with {_listed(gains)}" if gains else "")
    return [f"{first}.", *(f"It keeps {sentence}." for sentence in kept[1:])]


def _kept(table: ResultTable) -> Iterator[str]:
    cell = table.cell("retention", table.student)
    if cell.value is not None:
        yield f"{cell.text}{cell.interval and ' '}{cell.interval} of the teacher's success@{table.k} on “{table.set}”"


def savings(report: Mapping[str, Any]) -> list[str]:
    """What a student saves that is a text tower alone, in sentences; none for one with a picture tower.

    Args:
        report: The run's report.
    """
    saves = report.get("saves")
    if not saves:
        return []
    spent, unneeded = saves.get("seconds_not_spent"), saves.get("picture_parameters_not_loaded")
    sentences = [
        f"The teacher's index stays as it is: {count(saves.get('pictures_not_embedded_again'))} pictures are not "
        "embedded again" + (f" ({duration(spent)} at the teacher's own rate)." if _is_number(spent) else ".")
    ]
    teacher, student = (saves["text_tower"].get(who) or {} for who in (TEACHER, STUDENT))
    mine = f"{millions(student.get('parameters'))} parameters, {amount(student.get('megabytes'))} MB"
    if _is_number(teacher.get("parameters")):
        mine += f", where the teacher's has {millions(teacher['parameters'])}, {amount(teacher.get('megabytes'))} MB"
    if _is_number(saves.get("texts_per_s_ratio")):
        mine += f"; it embeds {times(saves['texts_per_s_ratio'])} the texts per second"
    sentences.append(f"Queries need the student's text tower alone: {mine}.")
    if _is_number(unneeded):
        sentences.append(
            f"The teacher's picture tower ({millions(unneeded)} parameters) is needed for new pictures only."
        )
    else:
        sentences.append("No picture tower is loaded to ask; new pictures are embedded by whoever embedded the others.")
    return sentences


def _gains(report: Mapping[str, Any]) -> Iterator[str]:
    sizes, speeds = both(report, "sizes"), both(report, "speeds")
    smaller, part = ratio(*sizes, "parameters"), (report.get("sizes") or {}).get("part")
    if smaller is not None:
        what = f"parameters in its {part}" if part else "parameters"
        yield f"{times(smaller)} fewer {what}" if smaller >= 1 else f"{times(1 / smaller)} the {what}"
    for field, unit in (("images_per_s", "pictures"), ("texts_per_s", "texts")):
        faster = ratio(*speeds[::-1], field)
        if faster is not None:
            yield f"{times(faster)} the {unit} per second"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
