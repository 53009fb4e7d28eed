"""Rows that behave like embeddings: clusters whose variance falls from axis to axis, and queries beside them."""

import numpy as np

from clipdistill.compression import Asked, Sides

DIM, GALLERY, QUERIES = 64, 400, 120


def unit(rows):
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def sides(seed=0, noise=0.25, turned=True):
    """Queries near their own gallery rows; the variance lies in few directions, turned away from the axes."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.random.default_rng(99).standard_normal((DIM, DIM)))[0] if turned else np.eye(DIM)
    scale = np.arange(1, DIM + 1) ** -0.8
    gallery = rng.standard_normal((GALLERY, DIM)) * scale
    queries = gallery[:QUERIES] + noise * rng.standard_normal((QUERIES, DIM)) * scale
    return Sides(unit(queries @ rotation), unit(gallery @ rotation))


def asked(teacher=None, name="val"):
    relevant = tuple((row,) for row in range(QUERIES))
    return Asked(name, tuple(f"p{row}" for row in range(GALLERY)), relevant, teacher or sides())


def slow_success(queries, gallery, k):
    """The share of queries whose own row is among the k largest inner products, the slow way."""
    found = 0
    for place, query in enumerate(queries):
        scores = [float(np.dot(query.astype(np.float64), row.astype(np.float64))) for row in gallery]
        found += place in sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:k]
    return found / len(queries)
