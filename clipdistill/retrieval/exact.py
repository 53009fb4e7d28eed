"""Exact nearest neighbours by inner product: the ground truth that every index and every student is measured against.

The score of a pair is *defined* so that it does not depend on the order of a sum: both vectors are rounded to multiples
of 2^-26, their inner product is taken exactly, and the result is rounded once, to float32. Products of two such numbers
are multiples of 2^-52, and partial sums stay below 2 for rows of about unit length, so float64 arithmetic is exact
whatever the BLAS, its threads, its kernels or the blocks. Hence equal rows tie exactly (plain float32 BLAS gives
duplicates different last bits, by their place in the block), and a ranking is the same on every machine. The rounding
moves a score by about 1e-8, less than float32 itself does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdistill.core.errors import DataError

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.floating[Any]]
_Grid = npt.NDArray[np.float64]
_Keys = npt.NDArray[np.int64]

NO_ID = -1
UNIT_TOLERANCE = 1e-3
LONGEST = 1.25
_SCALE = float(1 << 26)
_QUERIES = 1024
_LOW = 0xFFFFFFFF
_PADDING = np.iinfo(np.int64).min


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """The nearest gallery rows of each query, best first; equal scores in ascending row order.

    Attributes:
        ids: int64 [queries, k]: row numbers in the gallery; -1 where there are fewer than k.
        scores: float32 [queries, k]: inner products; -inf where the id is -1.
    """

    ids: Ids
    scores: Scores


def exact_top_k(queries: Vectors, gallery: Vectors, k: int, *, block: int = 4096) -> Ranking:
    """The k gallery rows with the largest inner products, exactly: score descending, then row number ascending.

    Both sides are walked in blocks, so memory holds 1024 x ``block`` scores at a time and never all of them; the
    gallery may be memory-mapped, and of any float type. No result depends on ``block``.

    Args:
        queries: Unit vectors [n, d].
        gallery: Unit vectors [m, d].
        k: How many; beyond m the rows are padded.
        block: How many gallery rows at a time.

    Raises:
        ValueError: If k or block is below 1.
        DataError: If the widths differ, or a row is not finite or longer than 1.25.
    """
    if k < 1 or block < 1:
        raise ValueError(f"k and block must be at least 1: got {k} and {block}")
    _check_widths(queries, gallery)
    held = [_search_block(_on_grid(rows, "queries"), gallery, k, block) for rows in _blocks(queries, _QUERIES)]
    return _decode(np.concatenate(held) if held else np.empty((0, k), np.int64))


def exact_scores(queries: Vectors, rows: Vectors) -> Scores:
    """The scores of chosen pairs, the same bits that :func:`exact_top_k` gives them.

    Args:
        queries: Unit vectors [n, d].
        rows: For each query its own c unit vectors [n, c, d].

    Returns:
        float32 [n, c].
    """
    wide = _on_grid(rows.reshape(-1, rows.shape[-1]), "gallery").reshape(rows.shape)
    return _rounded(np.einsum("nd,ncd->nc", _on_grid(queries, "queries"), wide))


def sorted_ranking(scores: Scores, ids: Ids, k: int) -> Ranking:
    """A ranking of found candidates: score descending, then id ascending, padding last, cut or padded to k.

    Args:
        scores: [queries, c], higher is better; ignored where the id is negative.
        ids: [queries, c], negative where there is none.
        k: The width of the result.
    """
    keys = np.where(ids < 0, _PADDING, _encode(scores.astype(np.float32, copy=False), np.maximum(ids, 0)))
    if keys.shape[1] < k:
        keys = np.pad(keys, ((0, 0), (0, k - keys.shape[1])), constant_values=_PADDING)
    return _decode(_largest(keys, k))


def check_unit(vectors: Vectors, what: str) -> None:
    """Refuse vectors that are not a matrix of finite unit rows (within 1e-3).

    Args:
        vectors: [n, d].
        what: Their name in the message.

    Raises:
        DataError: Naming the first row that is wrong, and its length.
    """
    if vectors.ndim != 2:
        raise DataError(f"{what}: expected a matrix [rows, dimensions], found shape {vectors.shape}")
    start = 0
    for rows in _blocks(vectors, 4096):
        lengths = _lengths(rows.astype(np.float32, copy=False))
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{what}: row {start + row} has length {lengths[row]:.6g}, expected 1 within {UNIT_TOLERANCE:g}. "
                "Divide each row by its Euclidean norm first"
            )
        start += len(rows)


def _check_widths(queries: Vectors, gallery: Vectors) -> None:
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise DataError(
            f"queries {queries.shape} and gallery {gallery.shape} must be matrices of the same width. "
            "Encode both with the same encoder, or project one side"
        )


def _blocks(rows: Vectors, size: int) -> list[Vectors]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _lengths(rows: Vectors) -> npt.NDArray[Any]:
    return np.asarray(np.sqrt(np.einsum("nd,nd->n", rows, rows)))


def _on_grid(rows: Vectors, what: str) -> _Grid:
    """The rows in units of 2^-26, as whole numbers in float64."""
    wide = np.multiply(rows, _SCALE, dtype=np.float64)
    lengths = _lengths(wide) / _SCALE
    if not bool(np.all(lengths <= LONGEST)):  # also false for NaN
        raise DataError(
            f"{what}: a row has length {lengths.max():.6g}, expected about 1 (at most {LONGEST}). "
            "Normalise the rows, and look for NaN"
        )
    return np.rint(wide, out=wide)


def _rounded(products: _Grid) -> Scores:
    return (products * (1 / _SCALE / _SCALE)).astype(np.float32)


def _search_block(queries: _Grid, gallery: Vectors, k: int, block: int) -> _Keys:
    """The k best keys of each query of one block, best first."""
    held = np.full((len(queries), k), _PADDING, np.int64)
    least = np.full((len(queries), 1), -np.inf, np.float32)
    for start in range(0, len(gallery), block):
        scores = _rounded(queries @ _on_grid(gallery[start : start + block], "gallery").T)
        # Rows come in ascending order, so a later row with an equal score has lost the tie already; but within the
        # first block, which fills the places, equal rows are all candidates.
        enough = start == 0 and scores.shape[1] > k
        rows, columns = np.nonzero(scores >= _kth_largest(scores, k) if enough else scores > least)
        if not len(rows):
            continue
        keys = _encode(scores[rows, columns], columns + start)
        held = _largest(np.concatenate([held, _padded(keys, rows, len(queries))], axis=1), k)
        least = _decode(held[:, -1:]).scores
    return held


def _kth_largest(scores: Scores, k: int) -> Scores:
    return np.partition(scores, scores.shape[1] - k, axis=1)[:, [scores.shape[1] - k]]


def _padded(keys: _Keys, rows: Ids, count: int) -> _Keys:
    """Ragged keys, in row order, as a matrix with padding on the right."""
    lengths = np.bincount(rows, minlength=count)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    matrix = np.full((count, int(lengths.max())), _PADDING, np.int64)
    matrix[rows, places] = keys
    return matrix


def _largest(keys: _Keys, k: int) -> _Keys:
    if keys.shape[1] > k:
        keys = np.partition(keys, keys.shape[1] - k, axis=1)[:, -k:]
    return np.sort(keys, axis=1)[:, ::-1]


def _encode(scores: Scores, ids: Ids) -> _Keys:
    """One sortable integer a hit: a larger score is a larger key, and at equal scores a smaller id is."""
    bits = (scores + np.float32(0)).view(np.int32)  # adding zero makes -0.0 and 0.0 the same bits
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative floats, the larger magnitude is the smaller number
    return np.asarray((ordered.astype(np.int64) << 32) | (_LOW - ids))


def _decode(keys: _Keys) -> Ranking:
    ordered = (keys >> 32).astype(np.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(np.float32)
    empty = keys == _PADDING
    return Ranking(
        ids=np.where(empty, np.int64(NO_ID), _LOW - (keys & _LOW)),
        scores=np.where(empty, np.float32(-np.inf), scores),
    )
