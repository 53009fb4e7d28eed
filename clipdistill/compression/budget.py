"""The recall budget: what each step from the teacher's exact search to the shipped index costs.

A budget is a list of steps. A step is embeddings of some sets, and the index they are searched through, if any; its row
is a pure function of these. Whatever makes embeddings can be one: a cut, a quantised tower, an exported runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clipdistill.retrieval import measures
from clipdistill.retrieval.exact import Ids, Vectors, exact_top_k
from clipdistill.retrieval.index import VectorIndex
from clipdistill.retrieval.measures import Relevant, Values

FLOAT_BYTES = 4
Kind = Literal["teacher", "student", "pruned", "truncated", "quantised", "index", "runtime"]
"""What a step changes, in the order in which the steps come."""


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """The embeddings of one set.

    Attributes:
        queries: Unit rows [queries, dim].
        gallery: Unit rows [gallery, dim].
    """

    queries: Vectors
    gallery: Vectors


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One set that is searched.

    Attributes:
        name: The set's name.
        keys: The gallery's names.
        relevant: For each query the right gallery rows; None where there is no ground truth.
        teacher: The teacher's embeddings, whose exact ranking is the reference.
    """

    name: str
    keys: tuple[str, ...]
    relevant: Relevant | None
    teacher: Sides


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step.

    Attributes:
        kind: What it changes.
        name: What it is.
        sides: The embeddings by the set's name.
        index: What they are searched through; its codebooks are kept and its rows replaced by each set's gallery. None
            = exact search.
        bytes_per_vector: What a vector of the gallery takes.
        megabytes: What the towers take, in 10^6 bytes; None where that is not known.
        images_per_s: Pictures that its towers embed in a second; None where that was not timed.
        texts_per_s: Texts that they embed in a second.
    """

    kind: Kind
    name: str
    sides: Mapping[str, Sides]
    index: VectorIndex | None
    bytes_per_vector: float
    megabytes: float | None
    images_per_s: float | None = None
    texts_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """What one step reaches on one set.

    Attributes:
        set: The set's name.
        kind: What the step changes.
        step: The step's name.
        k: The cut-off.
        success: success@k; None without ground truth, and so are all values but the overlap's.
        overlap: overlap@k with the teacher's exact ranking.
        retention: Success divided by the teacher's; None where the teacher has none.
        retention_low: The lower end of its paired bootstrap interval over the queries.
        retention_high: The upper end.
        kept: Success divided by that of the step before.
        kept_low: The lower end of its paired bootstrap interval.
        kept_high: The upper end.
        lost: Success lost at this step: that of the step before minus this one's; negative = gained.
        bytes_per_vector: What a vector of the gallery takes.
        megabytes: What the towers take, in 10^6 bytes; None where that is not known.
        images_per_s: Pictures a second; None where that was not timed. This and the next are the only values that
            depend on how busy the machine is.
        texts_per_s: Texts a second.
        queries: How many queries.
        gallery: Among how many vectors.
    """

    set: str
    kind: Kind
    step: str
    k: int
    success: float | None
    overlap: float
    retention: float | None
    retention_low: float | None
    retention_high: float | None
    kept: float | None
    kept_low: float | None
    kept_high: float | None
    lost: float | None
    bytes_per_vector: float
    megabytes: float | None
    images_per_s: float | None
    texts_per_s: float | None
    queries: int
    gallery: int


def exact_step(kind: Kind, name: str, sides: Mapping[str, Sides], megabytes: float | None) -> Step:
    """A step with exact search over float32 vectors."""
    width = next(iter(sides.values())).gallery.shape[1]
    return Step(kind, name, sides, None, float(width * FLOAT_BYTES), megabytes)


def index_step(kind: Kind, name: str, sides: Mapping[str, Sides], index: VectorIndex, megabytes: float | None) -> Step:
    """A step with search through an index; what a vector takes is measured on the index as it was built."""
    return Step(kind, name, sides, index, index.bytes_per_vector, megabytes)


def ranking(step: Step, asked: Asked, k: int) -> Ids:
    """The k nearest gallery rows of each query of a set as a step finds them: int64 [queries, k], -1 = none."""
    sides = step.sides[asked.name]
    if step.index is None:
        return exact_top_k(sides.queries, sides.gallery, k).ids
    return step.index.refilled(sides.gallery, asked.keys).search(sides.queries, k).ids


def success_of(asked: Asked, ids: Ids, k: int) -> Values | None:
    """success@k of each query of a set; None without ground truth."""
    return None if asked.relevant is None else measures.success_at_k(ids, asked.relevant, k)


def budget_rows(steps: Sequence[Step], asked: Asked, k: int, *, seed: int = 0) -> list[BudgetRow]:
    """The rows of a budget on one set, step by step.

    Args:
        steps: The steps, the teacher's exact search first: retention is against that.
        asked: The set.
        k: The cut-off.
        seed: Of the bootstrap.
    """
    found = [ranking(step, asked, k) for step in steps]
    values = [success_of(asked, ids, k) for ids in found]
    teacher = exact_top_k(asked.teacher.queries, asked.teacher.gallery, k).ids
    rows = []
    for place, (step, ids) in enumerate(zip(steps, found, strict=True)):
        mine, first, before = values[place], values[0], values[max(0, place - 1)]
        retention, kept = _share(mine, first, seed), _share(mine, before, seed)
        rows.append(
            BudgetRow(
                set=asked.name,
                kind=step.kind,
                step=step.name,
                k=k,
                success=None if mine is None else _rounded(mine.mean()),
                overlap=_rounded(measures.overlap_at_k(ids, teacher, k).mean()),
                retention=retention[0],
                retention_low=retention[1],
                retention_high=retention[2],
                kept=kept[0],
                kept_low=kept[1],
                kept_high=kept[2],
                lost=None if mine is None or before is None else _rounded(before.mean() - mine.mean()),
                bytes_per_vector=round(step.bytes_per_vector, 3),
                megabytes=None if step.megabytes is None else round(step.megabytes, 3),
                images_per_s=step.images_per_s,
                texts_per_s=step.texts_per_s,
                queries=len(ids),
                gallery=len(asked.keys),
            )
        )
    return rows


def most_lost(rows: Sequence[BudgetRow]) -> BudgetRow | None:
    """The row of the step at which a set lost the most success; None where nothing was lost."""
    lossy = [row for row in rows if row.lost is not None and row.lost > 0]
    return max(lossy, key=lambda row: row.lost or 0.0, default=None)


def _share(mine: Values | None, whole: Values | None, seed: int) -> tuple[float | None, float | None, float | None]:
    """A success against another with the ends of its interval; three None where there is nothing to divide by."""
    if mine is None or whole is None or not whole.any():
        return None, None, None
    low, high = measures.paired_bootstrap(mine, whole, seed=seed)
    return _rounded(measures.retention(mine, whole)), _rounded(low), _rounded(high)


def _rounded(value: float | np.floating[Any]) -> float:
    return round(float(value), 9)  # the last bits of a mean depend on the BLAS
