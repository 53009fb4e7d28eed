"""Unit vectors with keys such as data sets have."""

import numpy as np

from clipdistill.publish.rows import Rows


def unit_rows(count, dim=32, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(count, dim=32, seed=0, encoder="a" * 64):
    # Keys as data sets have them: paths, quotes, other scripts.
    keys = [("pictures/{}.png", 'it\'s "{}"; --', "Zürich {} 写真 🙂", "{}")[n % 4].format(n) for n in range(count)]
    return Rows(keys, unit_rows(count, dim, seed), encoder)
