"""Measuring: search exactly and through an index, compare with the truth and with the teacher, resample the queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.records import Pair
from clipdistill.evaluation.report import EXACT, INDEX_PREFIX, QueryRow, ReportRow, RetrievalReport
from clipdistill.evaluation.sets import Direction, Embedded, Judged, check_embedded, directions_of, judged
from clipdistill.retrieval import measures
from clipdistill.retrieval.exact import Ranking, Vectors, exact_top_k, sorted_ranking
from clipdistill.retrieval.index import VectorIndex
from clipdistill.retrieval.measures import Hits, Values
from clipdistill.towers.encoder import Encoder

TEACHER, STUDENT, QUERY_SIDE = "teacher", "student", "student_query_teacher_index"
TEXT_SIDE = "teacher_query_student_index"
"""The teacher's pictures against the texts of a student that has no pictures: the other way round."""


@dataclass(frozen=True)
class _Column:
    """One measure of one ranking, a value a query."""

    pairing: str
    search: str
    measure: str
    k: int
    values: Values


@dataclass(frozen=True)
class _Found:
    """One ranking of a direction's queries."""

    pairing: str
    search: str
    ranking: Ranking


def evaluate(
    encoder: Encoder,
    pairs: Sequence[Pair],
    *,
    name: str = "test",
    teacher: Embedded | Encoder | None = None,
    index: str | None = None,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
    to_teacher: Callable[[Vectors], Vectors] | None = None,
) -> RetrievalReport:
    """Measure an encoder's retrieval on some pairs, against the ground truth and against a teacher.

    Args:
        encoder: What is measured.
        pairs: The set's rows.
        name: The set's name in the report.
        teacher: The teacher, or its embeddings of ``judged(name, pairs)``; None = the ground truth alone.
        index: A FAISS factory string to measure through as well, or ``auto``; None = exact search alone.
        ks: The cut-offs.
        seed: Of the bootstrap.
        to_teacher: Maps the encoder's vectors to the teacher's width, where they differ; the rows are normalised after.

    Raises:
        DataError: If there is nothing to measure, or the embeddings do not fit the pairs.
        ConfigError: If a cut-off or the factory is not valid.
    """
    cutoffs = _checked_ks(ks)
    rows = judged(name, pairs)
    directions_of(rows, labelled_only=teacher is None)  # refuses before anything is encoded
    student = _embed(encoder, rows)
    reference = teacher if teacher is None or isinstance(teacher, Embedded) else _embed(teacher, rows)
    projected = None
    if to_teacher is not None and reference is not None:
        images, texts = (_unit(to_teacher(part)) for part in (student.images, student.texts))
        projected = Embedded(images, texts, student.fingerprint)
    return evaluate_embedded(
        rows, student, teacher=reference, student_in_teacher=projected, factory=index, ks=cutoffs, seed=seed
    )


def evaluate_embedded(
    judged: Judged,
    student: Embedded,
    *,
    teacher: Embedded | None = None,
    student_in_teacher: Embedded | None = None,
    narrower: Mapping[int, tuple[Embedded, Embedded | None]] | None = None,
    factory: str | None = None,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
) -> RetrievalReport:
    """Measure embeddings: text to image and image to text; image to image where there are no texts at all.

    Agreement (overlap, teacher_top1, rbo) is always with the teacher's exact ranking of the same direction, and
    retention with its success there, so a row measured through an index holds the loss of student and index together.

    Args:
        judged: The set.
        student: The student's embeddings of it.
        teacher: The teacher's; None = the ground truth alone.
        student_in_teacher: The student's, mapped to the teacher's width, to search the teacher's gallery with; None =
            the student's own where the widths are equal, and else that pairing is left out (and the protocol says so).
        narrower: By width, the student's embeddings cut to it, and the same mapped to the teacher's width or None:
            pairings of their own, ``student@64`` and ``student_query_teacher_index@64``.
        factory: A FAISS factory string to measure through as well, or ``auto``; None = exact search alone.
        ks: The cut-offs.
        seed: Of the bootstrap.

    Raises:
        DataError: If there is nothing to measure, or the embeddings do not fit the set.
        ConfigError: If a cut-off or the factory is not valid.
    """
    cutoffs = _checked_ks(ks)
    directions = directions_of(judged, labelled_only=teacher is None)
    pairings, left_out = _pairings(student, teacher, student_in_teacher)
    for width, (short, mapped) in (narrower or {}).items():
        cut = _pairings(short, teacher, mapped)[0]
        pairings |= {f"{name}@{width}": pair for name, pair in cut.items() if name != TEACHER}
    for who in {id(part): part for pair in pairings.values() for part in pair}.values():
        check_embedded(judged, who)
    rows: list[ReportRow] = []
    per_query: list[QueryRow] = []
    for direction in directions:
        measured, queries = _measure(judged.name, direction, pairings, factory, cutoffs, seed)
        rows += measured
        per_query += queries
    protocol = _protocol(judged, directions, student, teacher, cutoffs, seed, left_out)
    return RetrievalReport(tuple(rows), tuple(per_query), (protocol,))


def evaluate_query_side(
    judged: Judged,
    texts: Vectors,
    fingerprint: str,
    *,
    teacher: Embedded,
    factory: str | None = None,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
) -> RetrievalReport:
    """Measure a student that has texts alone, in its teacher's space: there is no student's own picture to search.

    Text to image is the student's queries against the teacher's index (``student_query_teacher_index``), and image to
    text the teacher's pictures against an index of the student's texts (``teacher_query_student_index``).

    Args:
        judged: The set; at least one text.
        texts: The student's embeddings of its texts in the teacher's space: unit rows [texts, D].
        fingerprint: The student's.
        teacher: The teacher's embeddings of the set.
        factory: As for :func:`evaluate_embedded`.
        ks: The cut-offs.
        seed: Of the bootstrap.

    Raises:
        DataError: If there is nothing to measure, or the embeddings do not fit the set.
        ConfigError: If a cut-off or the factory is not valid.
    """
    cutoffs = _checked_ks(ks)
    directions = directions_of(judged, labelled_only=False)
    if not judged.texts:
        raise DataError(f"{judged.name}: there are no texts, and a student without a picture tower has nothing to ask")
    mixed = Embedded(teacher.images, texts, fingerprint)
    for who in (teacher, mixed):
        check_embedded(judged, who)
    measured = []
    for direction in directions:
        asked = {QUERY_SIDE: (mixed, teacher)} if direction.name == "text_to_image" else {TEXT_SIDE: (teacher, mixed)}
        pairings = {TEACHER: (teacher, teacher), **asked}
        measured.append(_measure(judged.name, direction, pairings, factory, cutoffs, seed))
    left_out = [f"{STUDENT}: the student has no picture tower: pictures are the teacher's"]
    protocol = _protocol(judged, directions, mixed, teacher, cutoffs, seed, left_out)
    rows, queries = zip(*measured, strict=True)
    return RetrievalReport(tuple(chain(*rows)), tuple(chain(*queries)), (protocol,))


def _measure(
    name: str, direction: Direction, pairings: _Pairings, factory: str | None, ks: Sequence[int], seed: int
) -> tuple[list[ReportRow], list[QueryRow]]:
    """All pairings of one direction: the measured rows, and what each query returned."""
    found = list(_searches(direction, pairings, factory, ks[-1]))
    columns = [column for one in found for column in _columns(direction, one, found, ks)]
    queries = [row for one in found for row in _query_rows(name, direction, one, columns, ks)]
    return list(_rows(name, direction, columns, seed)), queries


def _checked_ks(ks: Sequence[int]) -> tuple[int, ...]:
    if not ks or any(k < 1 for k in ks):
        raise ConfigError(f"evaluate.ks: {list(ks)} must be one or more whole numbers of at least 1")
    return tuple(sorted(set(ks)))


def _embed(encoder: Encoder, rows: Judged) -> Embedded:
    empty = np.empty((0, encoder.dim), np.float32)
    return Embedded(
        images=encoder.encode_images(rows.pictures) if rows.pictures else empty,
        texts=encoder.encode_texts(rows.texts) if rows.texts else empty,
        fingerprint=encoder.fingerprint,
    )


def _unit(rows: Vectors) -> Vectors:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


_Pairings = dict[str, tuple[Embedded, Embedded]]


def _pairings(
    student: Embedded, teacher: Embedded | None, student_in_teacher: Embedded | None
) -> tuple[_Pairings, list[str]]:
    """Who asks and who answers, by the pairing's name; and what is left out, with the reason."""
    if teacher is None:
        return {STUDENT: (student, student)}, []
    pairings = {TEACHER: (teacher, teacher), STUDENT: (student, student)}
    mine, theirs = student.images.shape[1], teacher.images.shape[1]
    if student_in_teacher is None and mine != theirs:
        reason = f"the student's vectors are {mine} wide, the teacher's {theirs}, and no projection was given"
        return pairings, [f"{QUERY_SIDE}: {reason}"]
    return {**pairings, QUERY_SIDE: (student_in_teacher or student, teacher)}, []


def _searches(direction: Direction, pairings: _Pairings, factory: str | None, k: int) -> Iterator[_Found]:
    """Every pairing searched exactly and, where asked for, through an index; an index is built once a gallery."""
    depth = k + direction.finds_itself
    indexes: dict[int, VectorIndex] = {}
    for pairing, (asking, answering) in pairings.items():
        queries, gallery = direction.query_vectors(asking), direction.gallery_vectors(answering)
        yield _Found(pairing, EXACT, _without_self(direction, exact_top_k(queries, gallery, depth), k))
        if factory is None:
            continue
        if id(answering) not in indexes:
            indexes[id(answering)] = VectorIndex.build(
                gallery, direction.gallery, factory=factory, encoder=answering.fingerprint
            )
        index = indexes[id(answering)]
        yield _Found(
            pairing, f"{INDEX_PREFIX}{index.factory}", _without_self(direction, index.search(queries, depth), k)
        )


def _without_self(direction: Direction, ranking: Ranking, k: int) -> Ranking:
    if not direction.finds_itself:
        return ranking
    others = np.where(ranking.ids == direction.queries[:, None], -1, ranking.ids)
    return sorted_ranking(ranking.scores, others, k)


def _columns(direction: Direction, one: _Found, found: Sequence[_Found], ks: Sequence[int]) -> Iterator[_Column]:
    """All measures of one ranking; retention is made of two success columns, later."""
    ids = one.ranking.ids

    def column(measure: str, k: int, values: Values) -> _Column:
        return _Column(one.pairing, one.search, measure, k, values)

    if direction.relevant is not None:
        for k in ks:
            yield column("success", k, measures.success_at_k(ids, direction.relevant, k))
            yield column("recall", k, measures.recall_at_k(ids, direction.relevant, k))
    reference = found[0]
    if reference.pairing != TEACHER or one is reference:
        return
    wanted = reference.ranking.ids
    for k in ks:
        yield column("overlap", k, measures.overlap_at_k(ids, wanted, k))
        yield column("teacher_top1", k, measures.teacher_top1_at_k(ids, wanted, k))
    yield column("rbo", ks[-1], measures.rbo(ids, wanted, depth=ks[-1]))


def _rows(name: str, direction: Direction, columns: Sequence[_Column], seed: int) -> Iterator[ReportRow]:
    """The means and their intervals; all columns are resampled by the same queries, so retention's is paired."""
    matrix = np.stack([column.values for column in columns], axis=1)
    samples = measures.bootstrap_means(matrix, seed=seed)
    successes = {
        (column.pairing, column.search, column.k): i for i, column in enumerate(columns) if _is_success(column)
    }

    def row(column: _Column, measure: str, value: float, low: float, high: float) -> ReportRow:
        ends = (_known(value), _known(low), _known(high))
        where = (name, direction.name, column.pairing, column.search, measure, column.k)
        return ReportRow(*where, *ends, queries=len(direction.names), gallery=len(direction.gallery))

    for i, column in enumerate(columns):
        yield row(column, column.measure, float(column.values.mean()), *measures.interval(samples[:, i]))
        reference = successes.get((TEACHER, EXACT, column.k))
        if not _is_success(column) or reference is None or reference == i:
            continue
        value = measures.retention(column.values, columns[reference].values)
        paired = measures.interval(measures.ratios(samples[:, i], samples[:, reference]))
        yield row(column, "retention", value, *(paired if value == value else (value, value)))


def _is_success(column: _Column) -> bool:
    return column.measure == "success"


def _known(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 9)  # the last bits of a mean of means depend on the BLAS


def _query_rows(
    name: str, direction: Direction, one: _Found, columns: Sequence[_Column], ks: Sequence[int]
) -> Iterator[QueryRow]:
    mine = {
        (column.measure, column.k): column.values.tolist()
        for column in columns
        if (column.pairing, column.search) == (one.pairing, one.search)
    }
    overlaps = mine.get(("overlap", ks[-1]))
    if overlaps is None and (one.pairing, one.search) == (TEACHER, EXACT):
        overlaps = (one.ranking.ids[:, 0] >= 0).astype(float).tolist()  # of the reference with itself
    places = None if direction.relevant is None else _places(measures.hits(one.ranking.ids, direction.relevant))
    scores = np.round(one.ranking.scores.astype(np.float64), 6).tolist()
    for i, ids in enumerate(one.ranking.ids.tolist()):
        length = sum(row >= 0 for row in ids)
        yield QueryRow(
            set=name,
            direction=direction.name,
            pairing=one.pairing,
            search=one.search,
            query=direction.names[i],
            keys=tuple(direction.gallery[row] for row in ids[:length]),
            scores=tuple(scores[i][:length]),
            hit_ranks=None if places is None else places[i],
            overlap=None if overlaps is None else overlaps[i],
            success=None if places is None else {str(k): int(mine[("success", k)][i]) for k in ks},
        )


def _places(found: Hits) -> list[tuple[int, ...]]:
    return [tuple(place + 1 for place, hit in enumerate(row) if hit) for row in found.tolist()]


def _protocol(
    judged: Judged,
    directions: Sequence[Direction],
    student: Embedded,
    teacher: Embedded | None,
    ks: Sequence[int],
    seed: int,
    left_out: list[str],
) -> dict[str, Any]:
    captioned = [len(rows) for rows in judged.relevant_texts if rows]
    return {
        "set": judged.name,
        "pictures": len(judged.keys),
        "texts": len(judged.texts),
        "captions_an_image": round(float(np.mean(captioned)), 4) if captioned else 0.0,
        "directions": {
            direction.name: {
                "queries": len(direction.names),
                "gallery": len(direction.gallery),
                "ground_truth": direction.relevant is not None,
            }
            for direction in directions
        },
        "ks": list(ks),
        "rbo": {"p": 0.9, "depth": ks[-1]},
        "ties": "score descending, then row ascending",
        "duplicates": "equal texts are one query; every picture that carries it is right",
        "interval": {"level": measures.LEVEL, "resamples": measures.RESAMPLES, "seed": seed, "unit": "query"},
        "student": student.fingerprint,
        "teacher": None if teacher is None else teacher.fingerprint,
        "left_out": left_out,
    }
