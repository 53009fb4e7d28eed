"""The search over combinations of a width and an index: all are measured on ``val``, and the smallest is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clipdistill.compression.budget import Asked, Sides, Step, ranking, success_of
from clipdistill.compression.truncation import Cut
from clipdistill.config import TargetConfig
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.retrieval import measures
from clipdistill.retrieval.exact import Vectors, exact_top_k
from clipdistill.retrieval.index import VectorIndex


@dataclass(frozen=True, slots=True)
class Candidate:
    """One combination, as it was measured on ``val``.

    Attributes:
        dim: The width.
        rotation: ``whole``, ``leading`` or ``pca``.
        factory: The index's factory.
        success: success@k.
        overlap: overlap@k with the teacher's exact ranking.
        retention: Success divided by that of the target's whole: the teacher, or the uncompressed student.
        bytes_per_vector: What a vector takes in the index that would be shipped.
        megabytes: What the towers take, in 10^6 bytes.
    """

    dim: int
    rotation: str
    factory: str
    success: float
    overlap: float
    retention: float
    bytes_per_vector: float
    megabytes: float


@dataclass(frozen=True, slots=True)
class Miss:
    """The combination that comes nearest to a target which none keeps.

    Attributes:
        candidate: Which.
        retention: How much retention it lacks; 0 = none.
        megabytes: How many megabytes it is too large.
        bytes_per_vector: How many bytes a vector it is too large.
    """

    candidate: Candidate
    retention: float
    megabytes: float
    bytes_per_vector: float

    def __str__(self) -> str:
        parts = {
            f"{self.retention:.4f} short of the retention": self.retention,
            f"{self.megabytes:.2f} megabytes too large": self.megabytes,
            f"{self.bytes_per_vector:.1f} bytes a vector too large": self.bytes_per_vector,
        }
        return ", ".join(text for text, value in parts.items() if value > 0)


def try_all(
    cuts: Sequence[Cut],
    factories: Sequence[str],
    asked: Asked,
    sides: Sides,
    gallery: Vectors,
    *,
    k: int,
    of: str,
    megabytes: Callable[[Cut], float],
) -> tuple[list[Candidate], list[str]]:
    """Measure every combination of a cut and an index on one set.

    Args:
        cuts: The widths.
        factories: The factories; ``{parts}`` stands for half of the width.
        asked: The set, with ground truth.
        sides: The uncut student's embeddings of it.
        gallery: The uncut embeddings that the shipped index holds: each index is trained and its bytes are measured on
            them.
        k: The cut-off.
        of: ``teacher`` or ``student``: whose success is the whole of the retention.
        megabytes: What the towers take after a cut.

    Returns:
        What was measured, and a sentence for each combination that FAISS cannot make.

    Raises:
        ConfigError: If none can be made.
        DataError: If the set has no ground truth, or nothing of it is found by the target's whole.
    """
    found: list[Candidate] = []
    left_out: list[str] = []
    whole = _whole(asked, asked.teacher if of == "teacher" else sides, k)
    teacher = exact_top_k(asked.teacher.queries, asked.teacher.gallery, k).ids
    for cut in cuts:
        short, rows, size = Sides(cut.rows(sides.queries), cut.rows(sides.gallery)), cut.rows(gallery), megabytes(cut)
        for factory in dict.fromkeys(resolved(factory, cut.dim) for factory in factories):
            try:
                index = VectorIndex.build(rows, _numbers(len(rows)), factory=factory, encoder="candidate")
            except ConfigError as fault:
                left_out.append(f"{cut.dim} {cut.rotation}, {fault}")
                continue
            step = Step(factory, {asked.name: short}, index, index.bytes_per_vector, size)
            ids = ranking(step, asked, k)
            success = _mean(success_of(asked, ids, k))
            overlap = float(measures.overlap_at_k(ids, teacher, k).mean())
            ends = (round(step.bytes_per_vector, 3), round(size, 3))
            found.append(Candidate(cut.dim, cut.rotation, factory, success, overlap, success / whole, *ends))
    if not found:
        raise ConfigError(["compress.factories: none can be built", *left_out])
    return found, left_out


def resolved(factory: str, dim: int) -> str:
    """A factory for a width: ``{parts}`` is half of it."""
    return factory.replace("{parts}", str(max(1, dim // 2)))


def choose(candidates: Sequence[Candidate], target: TargetConfig) -> Candidate | None:
    """The smallest combination that keeps a target; None where none does.

    The smallest has the fewest bytes a vector, which grow with the collection; then the smallest towers; then the
    highest success.
    """
    keeping = [one for one in candidates if _worst(_shortfalls(one, target), target) == 0]
    return min(keeping, key=_size, default=None)


def nearest(candidates: Sequence[Candidate], target: TargetConfig) -> Miss:
    """The combination whose shares of what it lacks sum to the least, and what it lacks."""

    def lacking(one: Candidate) -> tuple[float, ...]:
        return (_worst(_shortfalls(one, target), target), *_size(one))

    best = min(candidates, key=lacking)
    return Miss(best, *_shortfalls(best, target))


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The combinations that no other beats in both bytes a vector and retention, from the fewest bytes on."""
    found: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.bytes_per_vector, -one.retention, one.megabytes)):
        if not found or one.retention > found[-1].retention:
            found.append(one)
    return found


def _size(one: Candidate) -> tuple[float, float, float, float]:
    return one.bytes_per_vector, one.megabytes, -one.success, -one.overlap


def _shortfalls(one: Candidate, target: TargetConfig) -> tuple[float, float, float]:
    """What it lacks of the retention, and by what it is too large in megabytes and in bytes a vector."""
    slack = 1e-9  # a mean of means is not exact in its last bits
    lacks = target.retention - one.retention
    heavy = 0.0 if target.megabytes is None else one.megabytes - target.megabytes
    # Whole bytes: the file's header is not to turn 64 bytes a vector into 64.01.
    wide = 0.0 if target.bytes_per_vector is None else math.floor(one.bytes_per_vector) - target.bytes_per_vector
    return tuple(value if value > slack else 0.0 for value in (lacks, heavy, wide))  # type: ignore[return-value]


def _worst(shortfalls: tuple[float, float, float], target: TargetConfig) -> float:
    bounds = (target.retention, target.megabytes or 1.0, target.bytes_per_vector or 1.0)
    return sum(value / bound for value, bound in zip(shortfalls, bounds, strict=True))


def _whole(asked: Asked, sides: Sides, k: int) -> float:
    success = success_of(asked, exact_top_k(sides.queries, sides.gallery, k).ids, k)
    if success is None or not success.any():
        raise DataError(
            f"{asked.name}: exact search finds no right answer in the top {k}, so there is no success to keep. "
            "Give a larger compress.k, or a val set with answers"
        )
    return _mean(success)


def _mean(values: measures.Values | None) -> float:
    return float("nan") if values is None else float(np.mean(values))


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
