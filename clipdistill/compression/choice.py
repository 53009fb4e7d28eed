"""The search over combinations of channels, width, precision and index: the smallest that keeps a target is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clipdistill.compression.budget import Asked, Sides, Step, index_step, ranking, success_of
from clipdistill.compression.truncation import Cut
from clipdistill.config import TargetConfig
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.retrieval import measures
from clipdistill.retrieval.exact import Ids, Vectors, exact_top_k
from clipdistill.retrieval.index import VectorIndex


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """One form of the student, uncut: its embeddings, and what it takes.

    Attributes:
        share: The share of its picture tower's channels that is kept.
        precision: Of its graphs: ``fp32``, ``fp16`` or ``int8``.
        cuts: The ways to narrow it.
        sides: Its embeddings by the set's name.
        gallery: Its embeddings of the rows that the shipped index holds: each index is trained and its bytes are
            measured on them.
        megabytes: What the towers take after a cut, in 10^6 bytes.
    """

    share: float
    precision: str
    cuts: tuple[Cut, ...]
    sides: Mapping[str, Sides]
    gallery: Vectors
    megabytes: Callable[[Cut], float]


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
        share: The share of the picture tower's channels that is kept.
        precision: Of the graphs.
    """

    dim: int
    rotation: str
    factory: str
    success: float
    overlap: float
    retention: float
    bytes_per_vector: float
    megabytes: float
    share: float = 1.0
    precision: str = "fp32"


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


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """What a combination is held against: one set, and the success that is the whole of its retention.

    Attributes:
        asked: The set.
        k: The cut-off.
        whole: The mean success@k of the target's whole.
        teacher: The teacher's exact ranking: int64 [queries, k].
    """

    asked: Asked
    k: int
    whole: float
    teacher: Ids

    @staticmethod
    def of(asked: Asked, whole: Sides, k: int) -> Judge:
        """The judge of a set.

        Args:
            asked: The set, with ground truth.
            whole: Whose success is kept: the teacher's embeddings, or the uncompressed student's.
            k: The cut-off.

        Raises:
            DataError: If the set has no ground truth, or nothing of it is found by the whole.
        """
        teacher = exact_top_k(asked.teacher.queries, asked.teacher.gallery, k).ids
        return Judge(asked, k, _whole(asked, whole, k), teacher)

    def measure(self, step: Step) -> dict[str, float]:
        """The measured values of a :class:`Candidate`, by their names."""
        ids = ranking(step, self.asked, self.k)
        success = _mean(success_of(self.asked, ids, self.k))
        return {
            "success": success,
            "overlap": float(measures.overlap_at_k(ids, self.teacher, self.k).mean()),
            "retention": success / self.whole,
            "bytes_per_vector": round(step.bytes_per_vector, 3),
            "megabytes": round(step.megabytes or 0.0, 3),
        }


def try_all(variants: Sequence[Variant], factories: Sequence[str], judge: Judge) -> tuple[list[Candidate], list[str]]:
    """Measure every combination of a variant, a cut and an index on one set.

    Args:
        variants: The forms of the student, each with its cuts.
        factories: The factories; ``{parts}`` stands for half of the width.
        judge: The set, and what is kept of it.

    Returns:
        What was measured, and a sentence for each combination that FAISS cannot make.

    Raises:
        ConfigError: If none can be made.
    """
    found: list[Candidate] = []
    left_out: dict[str, None] = {}  # whatever the variant, FAISS refuses for the width and the number of vectors
    for variant in variants:
        for cut in variant.cuts:
            sides = {judge.asked.name: cut.sides(variant.sides[judge.asked.name])}
            rows, size = cut.rows(variant.gallery), variant.megabytes(cut)
            for factory in dict.fromkeys(resolved(factory, cut.dim) for factory in factories):
                try:
                    index = VectorIndex.build(rows, _numbers(len(rows)), factory=factory, encoder="candidate")
                except ConfigError as fault:
                    left_out[f"{cut.dim} {cut.rotation}, {fault}"] = None
                    continue
                values = judge.measure(index_step("index", factory, sides, index, size))
                which = {"share": variant.share, "precision": variant.precision}
                found.append(Candidate(cut.dim, cut.rotation, factory, **values, **which))  # type: ignore[arg-type]
    if not found:
        raise ConfigError(["compress.factories: none can be built", *left_out])
    return found, list(left_out)


def resolved(factory: str, dim: int) -> str:
    """A factory for a width: ``{parts}`` is half of it."""
    return factory.replace("{parts}", str(max(1, dim // 2)))


def choose(candidates: Sequence[Candidate], target: TargetConfig) -> Candidate | None:
    """The smallest combination that keeps a target; None where none does."""
    return next(iter(keeping(candidates, target)), None)


def keeping(candidates: Sequence[Candidate], target: TargetConfig) -> list[Candidate]:
    """The combinations that keep a target, the smallest first.

    The smallest has the fewest bytes a vector, which grow with the collection; then the smallest towers; then the
    highest success.
    """
    return sorted((one for one in candidates if _worst(_shortfalls(one, target), target) == 0), key=_size)


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
