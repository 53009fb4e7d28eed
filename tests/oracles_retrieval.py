"""Slow definitions of search and of its measures, written from the papers and tools they come from, in plain Python."""

import math
from fractions import Fraction

import numpy as np

GRID = 1 << 26


def unit_rows(count, dim, seed, *, duplicates=0, dtype=np.float32):
    """Random unit rows; the last ``duplicates`` are copies of rows spread over the first ones."""
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)
    if duplicates:
        rows[count - duplicates :] = rows[np.arange(duplicates) * 7 % (count - duplicates)]
    return rows


def exact_inner_product(a, b):
    """The defined score: entries rounded to 2^-26, summed in rational numbers, rounded once."""
    total = sum(round(float(x) * GRID) * round(float(y) * GRID) for x, y in zip(a, b, strict=True))
    return np.float32(float(Fraction(total, GRID * GRID)))


def slow_top_k(queries, gallery, k):
    """Lists of (id, score): every pair scored alone, then sorted by score descending and id ascending."""
    found = []
    for query in queries:
        scored = [(row, exact_inner_product(query, vector)) for row, vector in enumerate(gallery)]
        found.append(sorted(scored, key=lambda item: (-item[1], item[0]))[:k])
    return found


def real(ids):
    return [int(row) for row in ids if row >= 0]


def success(ids, relevant, k):
    return [float(bool(set(real(row)[:k]) & set(truth))) for row, truth in zip(ids, relevant, strict=True)]


def recall(ids, relevant, k):
    return [len(set(real(row)[:k]) & set(truth)) / len(set(truth)) for row, truth in zip(ids, relevant, strict=True)]


def overlap(student, teacher, k):
    values = []
    for mine, theirs in zip(student, teacher, strict=True):
        wanted = set(real(theirs[:k]))
        values.append(len(set(real(mine[:k])) & wanted) / min(k, len(wanted)) if wanted else 0.0)
    return values


def teacher_top1(student, teacher, k):
    return [
        float(len(real(theirs[:1])) == 1 and int(theirs[0]) in real(mine[:k]))
        for mine, theirs in zip(student, teacher, strict=True)
    ]


def rbo_infinite(first, second, p, terms=4000):
    """The unextrapolated sum (1-p) sum p^(d-1) A_d, both lists agreeing or not beyond their end as they did at it.

    For lists of equal length k, extrapolation assumes that the agreement X_k / k goes on for ever: this sums that.
    """
    k = len(first)
    total = 0.0
    for d in range(1, terms):
        reach = min(d, k)
        total += (1 - p) * p ** (d - 1) * len(set(first[:reach]) & set(second[:reach])) / reach
    return total


def rbo_uneven(first, second, p):
    """Eq. 32 of Webber, Moffat, Zobel (2010), term by term."""
    short, long = sorted((list(first), list(second)), key=len)
    s, l = len(short), len(long)  # noqa: E741
    if s == 0:
        return 0.0

    def x(d):
        return len(set(short[: min(d, s)]) & set(long[:d]))

    total = sum(x(d) / d * p**d for d in range(1, l + 1))
    total += sum(x(s) * (d - s) / (s * d) * p**d for d in range(s + 1, l + 1))
    return (1 - p) / p * total + ((x(l) - x(s)) / l + x(s) / s) * p**l


def clip_benchmark_recall(scores, positive, k):
    """CLIP_benchmark's definition: the k best columns of each row, true positives over positives, then any above 0.

    Args:
        scores: [queries, gallery].
        positive: bool, the same shape.
    """
    values = []
    for row, right in zip(scores, positive, strict=True):
        best = sorted(range(len(row)), key=lambda column: -row[column])[:k]
        share = sum(bool(right[column]) for column in best) / sum(map(bool, right))
        values.append(share > 0)
    return sum(values) / len(values)


def slow_bootstrap_ratio(student, teacher, draws):
    """The percentile interval of a ratio of means for given draws of queries."""
    ratios = []
    for drawn in draws:
        top, bottom = sum(student[i] for i in drawn), sum(teacher[i] for i in drawn)
        if bottom:
            ratios.append(top / bottom)
    return tuple(np.percentile(ratios, [2.5, 97.5])) if ratios else (math.nan, math.nan)


class ToyEncoder:
    """An encoder in numpy: a picture's bytes and a text name the same concept, plus noise that is theirs alone.

    Args:
        noise: How far from the concept's direction an embedding lies.
        seed: Of the concepts' directions and of the noise.
    """

    def __init__(self, noise=0.5, seed=0, dim=16):
        self.noise, self.seed, self.dim = noise, seed, dim
        self.fingerprint = f"toy-{noise}-{seed}-{dim}"
        self.calls = []

    def encode_images(self, pictures, batch=64):
        self.calls.append(("images", len(pictures)))
        return self._rows([("picture", picture.read().decode()) for picture in pictures])

    def encode_texts(self, texts, batch=256):
        self.calls.append(("texts", len(texts)))
        return self._rows([("text", text) for text in texts])

    def _rows(self, items):
        rows = np.stack([self._one(kind, name) for kind, name in items])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def _one(self, kind, name):
        concept = name.split("/")[0]
        return self._draw(concept) + self.noise * self._draw(f"{kind} {name}")

    def _draw(self, name):
        rows = np.random.default_rng([self.seed, *name.encode()]).standard_normal(self.dim)
        return rows / np.linalg.norm(rows)
