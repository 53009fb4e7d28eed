"""Measures of a ranking: against the truth (success, recall), against another ranking (overlap, RBO), and intervals.

Three different things are called "recall@k" in this field, and each has its own name here:

* ``success@k``: any relevant item in the top k. What CLIP papers and CLIP_benchmark print as R@k.
* ``recall@k``: the share of the relevant items that is in the top k. What trec_eval and pytrec call recall_k.
* ``overlap@k``: the share of the teacher's top k that the student returns too.

All functions take rankings as int64 [queries, depth] of gallery rows, best first, and return one float64 a query, so
that a mean, a paired comparison or a bootstrap can be taken over the queries. Row i belongs to the i-th query of the
ground truth: a query for which nothing was retrieved is a row of -1 and scores 0, and can never be left out of a mean.
Padding (-1) never counts as an item, not even when both rankings have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from clipdistill.retrieval.exact import Ids

Values = npt.NDArray[np.float64]
Hits = npt.NDArray[np.bool_]
Relevant = Sequence[Sequence[int]]

RESAMPLES = 2000
LEVEL = 0.95
_DRAWN_AT_ONCE = 1 << 20


def hits(ids: Ids, relevant: Relevant) -> Hits:
    """Which places of a ranking hold a relevant item: bool, the shape of ``ids``.

    Args:
        ids: Ranking [queries, depth]; -1 is padding.
        relevant: For each query the gallery rows that answer it; repeats count once.

    Raises:
        ValueError: If there are not as many queries in both, or a row is retrieved twice.
    """
    if len(ids) != len(relevant):
        raise ValueError(f"the ranking has {len(ids)} queries, the ground truth {len(relevant)}: give one row a query")
    lengths = np.fromiter((len(rows) for rows in relevant), np.int64, len(relevant))
    flat = np.fromiter(chain.from_iterable(relevant), np.int64, int(lengths.sum()))
    span = _span(ids, flat)
    return np.isin(_pairs(ids, span), np.repeat(np.arange(len(ids)), lengths) * span + flat)


def success_at_k(ids: Ids, relevant: Relevant, k: int) -> Values:
    """1 where any relevant item is in the top k, else 0.

    CLIP papers and CLIP_benchmark print its mean as R@k; ir_measures calls it Success@k.

    Args:
        ids: Ranking [queries, depth], depth at least k.
        relevant: For each query the gallery rows that answer it.
        k: The cut-off.

    Raises:
        ValueError: If the ranking is shallower than k, or does not fit the truth.
    """
    return np.asarray(hits(_top(ids, k), relevant).any(axis=1), np.float64)


def recall_at_k(ids: Ids, relevant: Relevant, k: int) -> Values:
    """The share of a query's relevant items that is in the top k; 0 for a query without any.

    Definition: |relevant and retrieved in k| / |relevant|, trec_eval's ``recall_k``.

    Args:
        ids: Ranking [queries, depth], depth at least k.
        relevant: For each query the gallery rows that answer it; repeats count once.
        k: The cut-off.

    Raises:
        ValueError: If the ranking is shallower than k, or does not fit the truth.
    """
    found = hits(_top(ids, k), relevant).sum(axis=1)
    wanted = np.fromiter((len(set(rows)) for rows in relevant), np.int64, len(relevant))
    return np.asarray(found / np.maximum(wanted, 1), np.float64)


def overlap_at_k(student_ids: Ids, teacher_ids: Ids, k: int) -> Values:
    """The share of the teacher's top k that is in the student's top k, in any order.

    Definition: |A and B| / min(k, available), where A and B are the sets of the first k ids without padding, and
    `available` is how many the teacher has. 0 where the teacher has none.

    Args:
        student_ids: Ranking [queries, depth], depth at least k.
        teacher_ids: The reference ranking of the same queries over the same gallery.
        k: The cut-off.

    Raises:
        ValueError: If a ranking is shallower than k, or they have different numbers of queries.
    """
    student, teacher = _same_queries(_top(student_ids, k), _top(teacher_ids, k))
    span = _span(student, teacher)
    shared = np.isin(_pairs(student, span), _real(_pairs(teacher, span)))
    return np.asarray(shared.sum(axis=1) / np.maximum((teacher >= 0).sum(axis=1), 1), np.float64)


def teacher_top1_at_k(student_ids: Ids, teacher_ids: Ids, k: int) -> Values:
    """1 where the teacher's first hit is in the student's top k, else 0.

    Args:
        student_ids: Ranking [queries, depth], depth at least k.
        teacher_ids: The reference ranking of the same queries, depth at least 1.
        k: The cut-off.

    Raises:
        ValueError: If a ranking is too shallow, or they have different numbers of queries.
    """
    student, teacher = _same_queries(_top(student_ids, k), _top(teacher_ids, 1))
    return np.asarray(((student == teacher) & (teacher >= 0)).any(axis=1), np.float64)


def rbo(student_ids: Ids, teacher_ids: Ids, p: float = 0.9, depth: int | None = None) -> Values:
    """Rank-biased overlap, extrapolated: agreement that weighs the top most; 1 = the same ranking, 0 = disjoint.

    With X_d the number of items common to both first d places, s and l the shorter and the longer ranking's length:

        (1-p)/p (sum_{d=1..l} X_d/d p^d + sum_{d=s+1..l} X_s (d-s)/(s d) p^d) + ((X_l - X_s)/l + X_s/s) p^l

    Source: Webber, Moffat, Zobel, "A similarity measure for indefinite rankings", TOIS 2010, eq. 32. A query for which
    either ranking is empty scores 0.

    Args:
        student_ids: Ranking [queries, depth]; padding at the end shortens it.
        teacher_ids: The reference ranking of the same queries.
        p: How likely a reader goes on to the next place, in (0, 1): at 0.9 the first ten places carry 86%.
        depth: How many places are read; None = the shallower ranking's depth.

    Raises:
        ValueError: If p or depth is out of range, or the rankings have different numbers of queries.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must be between 0 and 1: got {p}")
    places = min(student_ids.shape[1], teacher_ids.shape[1]) if depth is None else depth
    student, teacher = _same_queries(_top(student_ids, places), _top(teacher_ids, places))
    lengths = np.stack([(student >= 0).sum(axis=1), (teacher >= 0).sum(axis=1)])
    short, long = lengths.min(axis=0), lengths.max(axis=0)
    common = _common_prefixes(student, teacher)
    at_short = np.take_along_axis(common, np.maximum(short - 1, 0)[:, None], axis=1)
    at_long = np.take_along_axis(common, np.maximum(long - 1, 0)[:, None], axis=1)
    d = np.arange(1, places + 1)
    s, l = np.maximum(short, 1)[:, None], np.maximum(long, 1)[:, None]  # noqa: E741  (the paper's letters)
    beyond = np.where(d > s, at_short * (d - s) / (s * d), 0)
    summed = np.where(d <= l, (common / d + beyond) * p**d, 0).sum(axis=1, keepdims=True)
    value = (1 - p) / p * summed + ((at_long - at_short) / l + at_short / s) * p**l
    return np.where(short > 0, value[:, 0], 0.0)


def retention(student: Values, teacher: Values) -> float:
    """The share of the teacher's quality that the student keeps: mean(student) / mean(teacher); NaN if the latter is 0.

    Args:
        student: Values of one measure, a query each.
        teacher: The teacher's values for the same queries.
    """
    _check_paired(student, teacher)
    whole = float(teacher.mean()) if len(teacher) else 0.0
    return float(student.mean()) / whole if whole else float("nan")


def bootstrap_means(values: Values, *, seed: int, resamples: int = RESAMPLES) -> Values:
    """The means of measures over resampled queries: each resample draws as many queries as there are, with replacement.

    All columns share the draws, so any comparison of two columns is a paired bootstrap.

    Args:
        values: [queries, measures].
        seed: Of the Philox generator; the same seed and number of queries give the same draws.
        resamples: How many.

    Returns:
        [resamples, measures]; NaN where there are no queries.
    """
    count = len(values)
    if not count:
        return np.full((resamples, values.shape[1]), np.nan)
    generator = np.random.Generator(np.random.Philox(seed))
    rows = max(1, _DRAWN_AT_ONCE // count)
    means = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = generator.integers(0, count, size=(size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        means.append(times.astype(np.float64) @ values / count)
    return np.concatenate(means)


def interval(samples: Values, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of bootstrap samples; undefined samples (NaN) are left out, and all NaN gives NaN.

    Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Args:
        samples: One value a resample.
        level: The probability between the two ends.
    """
    known = samples[~np.isnan(samples)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def bootstrap_interval(
    values: Values, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over queries.

    Args:
        values: One value a query.
        seed: Of the draws.
        resamples: How many times the queries are drawn.
        level: The interval's probability.
    """
    return interval(bootstrap_means(values[:, None], seed=seed, resamples=resamples)[:, 0], level)


def paired_bootstrap(
    student: Values, teacher: Values, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """The percentile bootstrap interval of :func:`retention`, both sides resampled by the same queries.

    Args:
        student: Values of one measure, a query each.
        teacher: The teacher's values for the same queries.
        seed: Of the draws.
        resamples: How many times the queries are drawn.
        level: The interval's probability.
    """
    _check_paired(student, teacher)
    means = bootstrap_means(np.stack([student, teacher], axis=1), seed=seed, resamples=resamples)
    return interval(ratios(means[:, 0], means[:, 1]), level)


def ratios(numerators: Values, denominators: Values) -> Values:
    """Element by element; NaN where the denominator is 0."""
    safe = np.where(denominators == 0, np.nan, denominators)
    return np.asarray(numerators / safe)


def _check_paired(student: Values, teacher: Values) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"values of the same queries are needed: got {student.shape} and {teacher.shape}")


def _top(ids: Ids, k: int) -> Ids:
    if k < 1 or ids.ndim != 2 or ids.shape[1] < k:
        raise ValueError(f"cannot take the top {k} of a ranking of shape {ids.shape}: search at least {k} deep")
    top = ids[:, :k]
    ordered = np.sort(top, axis=1)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if repeated.any():
        raise ValueError(f"the ranking of query {int(repeated.argmax())} holds a gallery row twice")
    return top


def _same_queries(student: Ids, teacher: Ids) -> tuple[Ids, Ids]:
    if len(student) != len(teacher):
        raise ValueError(f"the student's ranking has {len(student)} queries, the teacher's {len(teacher)}")
    return student, teacher


def _span(*ids: Ids) -> int:
    """A number above every id, so that query x span + id names a pair of both."""
    return max((int(part.max()) + 1 for part in ids if part.size), default=1) or 1


def _pairs(ids: Ids, span: int) -> Ids:
    """One number for each (query, id); -1 where the id is padding."""
    return np.where(ids >= 0, np.arange(len(ids))[:, None] * span + ids, -1)


def _real(pairs: Ids) -> Ids:
    return pairs[pairs >= 0]


def _common_prefixes(student: Ids, teacher: Ids) -> npt.NDArray[np.int64]:
    """X_d for d = 1..depth: how many items are in both first d places; int64 [queries, depth]."""
    span = _span(student, teacher)
    mine, theirs = _pairs(student, span), _pairs(teacher, span)
    order = np.argsort(theirs, axis=None)
    ordered = theirs.ravel()[order]
    found = np.minimum(np.searchsorted(ordered, mine.ravel()), max(len(ordered) - 1, 0))
    queries, places = np.nonzero(((ordered[found] == mine.ravel()) & (mine.ravel() >= 0)).reshape(mine.shape))
    other = order[found].reshape(mine.shape)[queries, places] % max(mine.shape[1], 1)
    met = np.zeros(mine.shape, np.int64)
    np.add.at(met, (queries, np.maximum(places, other)), 1)
    return np.cumsum(met, axis=1)
