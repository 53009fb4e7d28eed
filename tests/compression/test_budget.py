"""Cuts, the budget's rows and the choice, against slow re-derivations and planted targets."""

from itertools import pairwise

import numpy as np
import pytest
from compression.made import DIM, GALLERY, QUERIES, asked, sides, slow_success, unit

from clipdistill.compression import (
    Candidate,
    Judge,
    Sides,
    Variant,
    budget_rows,
    choose,
    cuts,
    exact_step,
    front,
    halves,
    index_step,
    nearest,
    try_all,
)
from clipdistill.config import TargetConfig
from clipdistill.core.errors import ConfigError
from clipdistill.retrieval.index import VectorIndex


def candidate(retention=1.0, size=64.0, megabytes=8.0, **rest):
    given = {"dim": 64, "rotation": "pca", "factory": "SQ8", "success": retention, "overlap": 0.5} | rest
    return Candidate(retention=retention, bytes_per_vector=size, megabytes=megabytes, **given)


def test_halves_end_at_32():
    assert halves(512) == (512, 256, 128, 64, 32)
    assert halves(100) == (100, 50)
    assert halves(24) == (24,)


def test_leading_cuts_are_the_first_entries_and_principal_ones_keep_the_most():
    rows = sides().gallery
    whole, leading, principal = cuts((DIM, 16), ("leading", "pca"), rows)
    assert whole.rows(rows) is rows
    np.testing.assert_allclose(leading.rows(rows), unit(rows[:, :16]), atol=1e-6)
    values, axes = np.linalg.eigh(rows.T.astype(np.float64) @ rows)
    largest = axes[:, np.argsort(-values)[:16]]
    np.testing.assert_allclose(np.abs(principal.rows(rows)), np.abs(unit(rows @ largest)), atol=1e-4)
    kept = {cut.rotation: float(np.square(rows @ cut.axes.numpy()).sum()) for cut in (leading, principal)}
    assert kept["pca"] > 1.5 * kept["leading"]
    with pytest.raises(ConfigError, match=r"compress.dims: 128 is wider .*\(64\)"):
        cuts((128,), ("leading",), rows)


def test_the_rows_say_where_success_is_lost():
    one, student = asked(), sides(noise=0.6)
    short = {"val": Sides(unit(student.queries[:, :8]), unit(student.gallery[:, :8]))}
    index = VectorIndex.build(short["val"].gallery, one.keys, factory="SQ4", encoder="e")
    steps = [
        exact_step("teacher", "teacher", {"val": one.teacher}, 100.0),
        exact_step("student", "student", {"val": student}, 10.0),
        exact_step("truncated", "cut", short, 9.0),
        index_step("index", "index", short, index, 9.0),
    ]
    rows = budget_rows(steps, one, 3)
    wanted = [slow_success(part.queries, part.gallery, 3) for part in (one.teacher, student, short["val"])]
    assert [row.success for row in rows[:3]] == pytest.approx(wanted)
    assert (rows[0].overlap, rows[0].retention, rows[0].lost) == (1.0, 1.0, 0.0)
    for before, row in pairwise(rows):
        assert row.lost == pytest.approx(before.success - row.success)
        assert row.kept == pytest.approx(row.success / before.success)
        assert row.retention == pytest.approx(row.success / rows[0].success)
        assert row.retention_low <= row.retention <= row.retention_high
    assert [row.bytes_per_vector for row in rows[:3]] == [256, 256, 32]
    assert rows[3].bytes_per_vector == round(index.bytes_per_vector, 3) < 32
    assert {(row.queries, row.gallery) for row in rows} == {(QUERIES, GALLERY)}


def test_without_ground_truth_the_overlap_is_left():
    one = asked()
    bare = type(one)(one.name, one.keys, None, one.teacher)
    row = budget_rows(
        [
            exact_step("teacher", "t", {"val": one.teacher}, None),
            exact_step("student", "s", {"val": sides(noise=1)}, None),
        ],
        bare,
        5,
    )[1]
    assert (row.success, row.retention, row.kept, row.lost, row.megabytes) == (None,) * 5
    assert 0 < row.overlap < 1


def tried(of="teacher", factories=("Flat", "SQ8", "PQ{parts}x4fs", "RaBitQ", "PQ7x4fs")):
    student = sides(noise=0.3)
    ways = cuts((64, 32, 16), ("leading", "pca"), student.gallery)
    whole = Variant(1.0, "fp32", tuple(ways), {"val": student}, student.gallery, lambda cut: cut.dim / 8)
    coarse = Sides(*(np.round(part * 24) / 24 for part in (student.queries, student.gallery)))  # hardly any bits
    coarse = Sides(unit(coarse.queries), unit(coarse.gallery))
    small = Variant(1.0, "int8", tuple(ways), {"val": coarse}, coarse.gallery, lambda cut: cut.dim / 32)
    judge = Judge.of(asked(), asked().teacher if of == "teacher" else student, 3)
    return try_all([whole, small], factories, judge)


def test_all_combinations_are_measured_and_what_cannot_be_made_is_told():
    found, left_out = tried()
    assert len(found) == 2 * 5 * 4
    assert len(left_out) == 5
    assert all("PQ7x4fs" in reason for reason in left_out)
    flat = next(one for one in found if (one.dim, one.factory) == (64, "Flat"))
    student, teacher = (slow_success(part.queries, part.gallery, 3) for part in (sides(noise=0.3), sides()))
    assert flat.success == pytest.approx(student)
    assert flat.retention == pytest.approx(student / teacher)
    assert {one.factory for one in found if one.dim == 32} >= {"PQ16x4fs"}
    assert next(one for one in tried("student")[0] if (one.dim, one.factory) == (64, "Flat")).retention == 1
    with pytest.raises(ConfigError, match="none can be built"):
        tried(factories=("PQ7x4fs",))


def test_a_planted_target_is_met_by_the_smallest_that_keeps_it():
    found, _ = tried()
    target = TargetConfig(retention=0.9, bytes_per_vector=200.0)
    chosen = choose(found, target)
    keeping = [one for one in found if one.retention >= 0.9 and one.bytes_per_vector < 201]
    assert chosen in keeping
    assert chosen.bytes_per_vector == min(one.bytes_per_vector for one in keeping)
    assert chosen.bytes_per_vector < 256


def test_equal_sizes_are_decided_by_the_towers_and_then_by_success():
    heavy, light, better = candidate(megabytes=9), candidate(0.98), candidate(0.99, rotation="leading")
    assert choose([heavy, light, better], TargetConfig()) is better
    assert choose([heavy, candidate(0.96)], TargetConfig()) is heavy


def test_a_target_that_none_keeps_is_missed_by_what_lacks_least():
    target = TargetConfig(retention=0.9, megabytes=8.0, bytes_per_vector=64.0)
    near, far = candidate(0.88, 60, 8.4), candidate(0.99, 64, 80)
    assert choose([near, far], target) is None
    miss = nearest([far, near], target)
    assert miss.candidate is near
    assert (miss.retention, miss.megabytes, miss.bytes_per_vector) == pytest.approx((0.02, 0.4, 0))
    assert str(miss) == "0.0200 short of the retention, 0.40 megabytes too large"


def test_the_front_rises():
    found = [candidate(0.5, 8), candidate(0.4, 8), candidate(0.45, 16), candidate(0.9, 32), candidate(0.9, 64)]
    assert [(one.bytes_per_vector, one.retention) for one in front(found)] == [(8, 0.5), (32, 0.9)]


def test_a_files_header_is_no_byte_too_many():
    target = TargetConfig(bytes_per_vector=64.0)
    assert choose([candidate(size=64.013)], target) is not None
    assert choose([candidate(size=65.2)], target) is None
    assert nearest([candidate(size=65.2)], target).bytes_per_vector == 1
