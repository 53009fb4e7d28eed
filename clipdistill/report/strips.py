"""Which queries to show with their pictures, and the pictures as thumbnails inside the page."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from clipdistill.core.errors import DataError
from clipdistill.data.pictures import decode
from clipdistill.data.records import Picture
from clipdistill.evaluation import QueryRow, RetrievalReport
from clipdistill.report.tables import EXACT, QUERY_SIDE, STUDENT, TEACHER, TEXT_TO_IMAGE

THUMBNAIL = 96
"""The longer side of a thumbnail, in pixels."""

SHOWN = 5
"""How many hits of each model a strip shows."""

_MAX_PIXELS = 100_000_000
_QUALITY = 75
_ALIKE = 0.5


@dataclass(frozen=True, slots=True)
class Hit:
    """One picture that a model returned.

    Attributes:
        key: The picture's key.
        score: The inner product of query and picture.
        relevant: Whether the ground truth says that it answers the query.
        agreed: Whether the other model shows it too.
    """

    key: str
    score: float
    relevant: bool
    agreed: bool


@dataclass(frozen=True, slots=True)
class Strip:
    """One query beside what both models returned.

    Attributes:
        query: The text.
        teacher: The teacher's first hits, best first.
        student: The student's.
        overlap: The share of the teacher's hits that the student returns too, over the report's whole depth.
        depth: That depth.
        ranks: The place of the first relevant picture for teacher and student; None where none was returned.
    """

    query: str
    teacher: tuple[Hit, ...]
    student: tuple[Hit, ...]
    overlap: float
    depth: int
    ranks: tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """The queries to show of one evaluation set.

    Attributes:
        best: Where the student agrees most with the teacher, best first.
        worst: Where it agrees least, worst first.
    """

    best: tuple[Strip, ...]
    worst: tuple[Strip, ...]


def strips_of(report: RetrievalReport, name: str) -> list[Strip]:
    """Every text query of a set that both models answered by exact search, in the report's order.

    A student without pictures of its own answers from its teacher's.

    Args:
        report: The retrieval report.
        name: The evaluation set.
    """
    rows = report.queries(set=name, direction=TEXT_TO_IMAGE, search=EXACT)
    teachers = {row.query: row for row in rows if row.pairing == TEACHER}
    pairing = STUDENT if any(row.pairing == STUDENT for row in rows) else QUERY_SIDE
    students = [row for row in rows if row.pairing == pairing and row.query in teachers]
    return [_strip(teachers[row.query], row) for row in students]


def _strip(teacher: QueryRow, student: QueryRow) -> Strip:
    depth = len(teacher.keys)
    common = len(set(teacher.keys) & set(student.keys)) / max(1, depth)
    overlap = common if student.overlap is None else student.overlap
    ranks = tuple(min(row.hit_ranks or (), default=None) for row in (teacher, student))
    return Strip(student.query, _hits(teacher, student), _hits(student, teacher), overlap, depth, (ranks[0], ranks[1]))


def _hits(row: QueryRow, other: QueryRow) -> tuple[Hit, ...]:
    shown, relevant = set(other.keys[:SHOWN]), set(row.hit_ranks or ())
    pairs = list(zip(row.keys, row.scores, strict=False))[:SHOWN]
    return tuple(Hit(key, score, rank in relevant, key in shown) for rank, (key, score) in enumerate(pairs, 1))


def choose(strips: Sequence[Strip], count: int) -> Choice:
    """The best and the worst queries by agreement with the teacher, no query twice and no two that say the same.

    Among the best, those that the student answers rightly come first; among the worst, those that the teacher answers
    and the student does not. What is then still equal is ordered by the SHA-256 of the text: a fixed order that does
    not favour the beginning of the alphabet. A query that is much like one already taken (half of the words in common,
    or of the pictures) is passed over while others are left.

    Args:
        strips: The queries to choose from.
        count: How many of the best, and of the worst; fewer where there are not twice as many queries.
    """
    best = _spread(sorted(strips, key=_best_first), min(count, (len(strips) + 1) // 2))
    taken = {strip.query for strip in best}
    rest = [strip for strip in strips if strip.query not in taken]
    return Choice(best, _spread(sorted(rest, key=_worst_first), count))


def _best_first(strip: Strip) -> tuple[float, int, str]:
    return -strip.overlap, strip.ranks[1] or strip.depth + 1, _lot(strip.query)


def _worst_first(strip: Strip) -> tuple[float, int, str]:
    teacher, student = (rank or strip.depth + 1 for rank in strip.ranks)
    return strip.overlap, teacher - student, _lot(strip.query)


def _lot(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _spread(ordered: Sequence[Strip], count: int) -> tuple[Strip, ...]:
    """The first ``count``, those that are much like an earlier one only where nothing else is left."""
    taken: list[Strip] = []
    passed: list[Strip] = []
    for strip in ordered:
        if len(taken) == count:
            break
        (passed if any(_alike(strip, other) for other in taken) else taken).append(strip)
    return tuple((taken + passed)[:count])


def _alike(one: Strip, other: Strip) -> bool:
    words, others = _words(one.query), _words(other.query)
    smaller = min(len(words), len(others))
    if smaller and len(words & others) >= _ALIKE * smaller:
        return True
    shown, shown_by_other = _shown(one), _shown(other)
    return bool(shown) and len(shown & shown_by_other) >= _ALIKE * min(len(shown), len(shown_by_other))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _shown(strip: Strip) -> set[str]:
    return {hit.key for hit in (*strip.teacher, *strip.student)}


def thumbnails(keys: Iterable[str], pictures: Mapping[str, Picture]) -> dict[str, str]:
    """Small copies of pictures as ``data:`` URIs, by key, each once; one that is missing or undecodable is left out.

    Args:
        keys: The pictures to copy.
        pictures: Where their bytes are.
    """
    found: dict[str, str] = {}
    for key in dict.fromkeys(keys):
        uri = _thumbnail(pictures[key]) if key in pictures else None
        if uri is not None:
            found[key] = uri
    return found


def _thumbnail(picture: Picture) -> str | None:
    try:
        image = decode(picture.read(), _MAX_PIXELS, picture.origin)
    except (OSError, DataError):  # the page shows a placeholder: the run itself has judged its pictures long before
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
