"""Coverage: how well the rows to train on cover the rows to be judged by, in the teacher's space.

A student imitates its teacher where it was trained. A query far from every training row is answered by luck, whatever
the loss; and rows that all lie along a few directions teach nothing of the others. Both are measured here, before any
training: the distance (1 - cosine) of each query to its nearest training row, with the training rows' own distances to
each other as the yardstick, and the effective rank of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipdistill.core.errors import DataError
from clipdistill.retrieval.exact import Vectors, exact_top_k

MAX_ROWS = 50_000
"""At most so many training rows are searched; what is measured with them holds for so many."""
MAX_QUERIES = 2_000
"""At most so many rows are asked for their nearest neighbour, on each side."""
FAR = 0.95
"""The quantile of the training rows' own distances from which on a query counts as far away."""
MOST_FAR = 0.25
"""The share of queries that may be far away; 0.05 would be if they were spread as the training rows are."""
_BLOCK = 4096

Distances = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How well training rows cover the queries of one kind; distances are 1 - cosine to the nearest training row.

    Attributes:
        queries: How many rows were asked for.
        rows: How many training rows they were compared with.
        median: The queries' median distance.
        p90: Their 90th percentile.
        own_median: The same of the training rows themselves, each without itself.
        own_p90: Its 90th percentile.
        own_far: Its :data:`FAR` quantile.
        far: The share of the queries that are farther away than ``own_far``.
        rank: The effective rank of the queries.
        own_rank: The effective rank of the training rows.
    """

    queries: int
    rows: int
    median: float
    p90: float
    own_median: float
    own_p90: float
    own_far: float
    far: float
    rank: float
    own_rank: float

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the queries are not covered, a phrase each; none where they are.

        The rule: more than :data:`MOST_FAR` of them are farther away than all but the last twentieth of the training
        rows are from each other, or the training rows spread over fewer directions than the queries do.
        """
        found = []
        if self.far > MOST_FAR:
            found.append(f"{self.far:.0%} are farther from training than 95% of the training rows from each other")
        if self.own_rank < self.rank:
            found.append(f"training spreads over {self.own_rank:.0f} directions, they over {self.rank:.0f}")
        return tuple(found)


def cover(queries: Vectors, rows: Vectors) -> Coverage:
    """Measure how well training rows cover queries.

    Args:
        queries: Unit rows [n, d], at least 1.
        rows: Unit training rows [m, d], at least 2. Both are thinned out evenly beyond :data:`MAX_QUERIES` and
            :data:`MAX_ROWS`.

    Raises:
        DataError: If there are too few rows, or the widths differ.
    """
    if len(queries) < 1 or len(rows) < 2:
        raise DataError(f"coverage needs a query and two training rows; there are {len(queries)} and {len(rows)}")
    rows = evenly(rows, MAX_ROWS)
    asked = evenly(queries, MAX_QUERIES)
    theirs = 1 - exact_top_k(asked, rows, 1).scores[:, 0].astype(np.float64)
    own = own_distances(rows)
    limit = float(np.quantile(own, FAR))
    return Coverage(
        queries=len(asked),
        rows=len(rows),
        median=float(np.median(theirs)),
        p90=float(np.quantile(theirs, 0.9)),
        own_median=float(np.median(own)),
        own_p90=float(np.quantile(own, 0.9)),
        own_far=limit,
        far=float(np.mean(theirs > limit)),
        rank=effective_rank(queries),
        own_rank=effective_rank(rows),
    )


def own_distances(rows: Vectors) -> Distances:
    """The distance of each row to the nearest other one: float64 [at most MAX_QUERIES], the rows evenly thinned out."""
    chosen = _places(len(rows), MAX_QUERIES)
    found = exact_top_k(rows[chosen], rows, 2)
    # A row is its own first hit, but for an earlier twin's: then the first hit is another row, as near as can be.
    itself = found.ids[:, 0] == chosen
    return 1 - np.where(itself, found.scores[:, 1], found.scores[:, 0]).astype(np.float64)


def effective_rank(rows: Vectors) -> float:
    """Over how many directions rows spread: the exponential of the entropy of their normalised singular values.

    ``erank(A) = exp(-sum p_k ln p_k)``, ``p_k = s_k / sum s`` (Roy & Vetterli 2007, EUSIPCO). The singular values are
    those of the rows about their mean: what all embeddings of a modality share says nothing about their diversity, and
    as the largest value of all it would hide the others. They are the roots of the eigenvalues of the d x d scatter
    matrix, which is summed up block by block.

    Args:
        rows: [n, d].

    Returns:
        Between 1 and min(n - 1, d); 0.0 where all rows are equal.
    """
    total, scatter = np.zeros(rows.shape[1]), np.zeros((rows.shape[1], rows.shape[1]))
    for block in _blocks(rows):
        total += block.sum(axis=0)
    mean = total / max(1, len(rows))
    for block in _blocks(rows):
        scatter += (block - mean).T @ (block - mean)
    values = np.linalg.eigvalsh(scatter)
    # Rounding leaves values of 1e-16 of the largest where there are none; the root would make them 1e-8 of it.
    singular = np.sqrt(values[values > values.max(initial=0.0) * 1e-12])
    if not singular.sum():
        return 0.0
    shares = singular / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def evenly(rows: Vectors, most: int) -> Vectors:
    """At most so many of the rows, evenly spread over them."""
    return rows if len(rows) <= most else rows[_places(len(rows), most)]


def _places(count: int, most: int) -> npt.NDArray[np.int64]:
    taken = min(count, most)
    return np.arange(taken) * count // max(1, taken)


def _blocks(rows: Vectors) -> Iterator[npt.NDArray[np.float64]]:
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK].astype(np.float64)
