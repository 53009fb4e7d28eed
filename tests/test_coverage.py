import numpy as np
import pytest

from clipdistill.core.errors import DataError
from clipdistill.evaluation import coverage
from clipdistill.evaluation.coverage import cover, effective_rank, own_distances


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def noise(count, dim=8, seed=0):
    return unit(np.random.default_rng(seed).standard_normal((count, dim)))


def slow_nearest(query, rows, without=None):
    return min(1 - float(np.dot(query.astype(np.float64), row)) for n, row in enumerate(rows) if n != without)


def test_distances_are_those_of_a_slow_search():
    queries, rows = noise(40, seed=1), noise(90, seed=2)
    found = cover(queries, rows)
    theirs = [slow_nearest(query, rows) for query in queries]
    own = [slow_nearest(row, rows, without=number) for number, row in enumerate(rows)]
    limit = np.quantile(own, 0.95)
    assert (found.queries, found.rows) == (40, 90)
    wanted = (np.median(theirs), np.quantile(theirs, 0.9), np.median(own), np.quantile(own, 0.9), limit)
    assert (found.median, found.p90, found.own_median, found.own_p90, found.own_far) == pytest.approx(wanted, abs=1e-6)
    assert found.far == pytest.approx(np.mean(np.asarray(theirs) > limit))


def test_a_row_with_twins_is_at_no_distance_from_them_and_never_its_own_neighbour():
    rows = noise(6)[[0, 1, 0, 2, 0, 3, 4, 5]]
    own = own_distances(rows)
    assert own[[0, 2, 4]] == pytest.approx(0, abs=1e-6)
    assert own[[1, 3, 5]] == pytest.approx([slow_nearest(rows[n], rows, without=n) for n in (1, 3, 5)], abs=1e-6)
    assert own[1] > 0.01


@pytest.mark.parametrize("shape", [(5, 8), (200, 8), (9000, 6)])
def test_the_effective_rank_is_that_of_the_singular_values(shape):
    rows = unit(np.random.default_rng(3).standard_normal(shape) * np.arange(1, shape[1] + 1) + 2.0)
    values = np.linalg.svd(rows - rows.mean(axis=0, dtype=np.float64), compute_uv=False)
    shares = values[values > 1e-9] / values[values > 1e-9].sum()
    assert effective_rank(rows) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_the_effective_rank_counts_directions():
    corners = unit(np.concatenate([np.eye(6), -np.eye(6)]))
    assert effective_rank(corners) == pytest.approx(6)
    assert effective_rank(np.repeat(corners[:1], 9, axis=0)) == 0
    line = unit(np.stack([[1.0, 0.1 * step, 0.0] for step in range(4)]))
    assert effective_rank(line) < 2


def test_the_same_kind_of_rows_is_covered_and_another_is_not():
    rng = np.random.default_rng(5)
    rows = unit(rng.standard_normal((400, 16)) * ([1.0] * 8 + [0.05] * 8))
    assert cover(rows[:100], rows[100:]).faults == ()
    elsewhere = unit(rng.standard_normal((200, 16)) * ([0.05] * 8 + [1.0] * 8))
    found = cover(elsewhere, rows)
    assert found.far > 0.9
    assert "farther from training" in found.faults[0]


def test_rows_along_fewer_directions_are_a_fault_of_their_own():
    rng = np.random.default_rng(6)
    narrow = unit(rng.standard_normal((300, 16)) * ([1.0] * 3 + [0.0] * 13))
    found = cover(noise(100, 16), narrow)
    assert found.own_rank <= 3 < found.rank
    assert f"3 directions, they over {found.rank:.0f}" in found.faults[-1]


def test_many_rows_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(coverage, "MAX_QUERIES", 10)
    monkeypatch.setattr(coverage, "MAX_ROWS", 20)
    rows = noise(60)
    found = cover(rows[::2], rows)
    assert (found.queries, found.rows) == (10, 20)
    assert found.own_median == pytest.approx(
        np.median([slow_nearest(rows[::3][n], rows[::3], without=n) for n in range(0, 20, 2)]), abs=1e-6
    )


@pytest.mark.parametrize(("queries", "rows"), [(0, 5), (3, 1)])
def test_too_few_rows_are_refused(queries, rows):
    with pytest.raises(DataError, match=f"there are {queries} and {rows}"):
        cover(noise(queries), noise(rows))
