import numpy as np
import pytest
from oracles_retrieval import slow_top_k, unit_rows

from clipdistill.core.errors import DataError
from clipdistill.retrieval.exact import check_unit, exact_scores, exact_top_k, sorted_ranking


def assert_same(ranking, slow, k):
    for row, wanted in enumerate(slow):
        count = len(wanted)
        assert ranking.ids[row, :count].tolist() == [item for item, _ in wanted]
        assert ranking.scores[row, :count].tolist() == [float(score) for _, score in wanted]
        assert ranking.ids[row, count:].tolist() == [-1] * (k - count)
        assert np.all(np.isneginf(ranking.scores[row, count:]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("k", "block"), [(1, 4096), (5, 3), (40, 7), (60, 1), (60, 4096)])
def test_ids_and_scores_are_those_of_rational_arithmetic_with_ties_and_k_beyond_n(dtype, k, block):
    gallery = unit_rows(40, 11, 1, duplicates=15, dtype=dtype)
    queries = np.concatenate([unit_rows(4, 11, 2), gallery[:3].astype(np.float32)])
    ranking = exact_top_k(queries, gallery, k, block=block)
    assert ranking.ids.dtype == np.int64
    assert ranking.scores.dtype == np.float32
    assert ranking.ids.shape == ranking.scores.shape == (7, k)
    assert_same(ranking, slow_top_k(queries, gallery, k), k)


def test_all_rows_equal_come_in_ascending_order():
    gallery = np.tile(unit_rows(1, 129, 3), (3000, 1))
    for block in (64, 1000, 4096):
        assert exact_top_k(unit_rows(2, 129, 4), gallery, 25, block=block).ids.tolist() == [list(range(25))] * 2


def test_duplicate_rows_tie_where_blas_would_tell_them_apart():
    gallery = unit_rows(5000, 257, 5)
    gallery[3001:4001] = gallery[:1000]
    queries = unit_rows(60, 257, 6)
    ranking = exact_top_k(queries, gallery, 5000)
    place = np.empty((60, 5000), int)
    np.put_along_axis(place, ranking.ids, np.arange(5000)[None], axis=1)
    assert np.all(place[:, :1000] < place[:, 3001:4001])
    score = np.take_along_axis(ranking.scores, place, axis=1)
    assert np.array_equal(score[:, :1000], score[:, 3001:4001])


def test_no_score_depends_on_blocks_or_on_the_company_of_a_query():
    gallery, queries = unit_rows(3000, 96, 7, duplicates=500), unit_rows(1030, 96, 8)
    whole = exact_top_k(queries, gallery, 13)
    for block in (17, 1024, 2999):
        again = exact_top_k(queries, gallery, 13, block=block)
        assert np.array_equal(whole.ids, again.ids)
        assert np.array_equal(whole.scores, again.scores)
    alone = exact_top_k(queries[1027:1028], gallery, 13)
    assert np.array_equal(whole.ids[1027:1028], alone.ids)
    assert np.array_equal(whole.scores[1027:1028], alone.scores)
    assert np.array_equal(exact_scores(queries[:50], gallery[whole.ids[:50]]), whole.scores[:50])


def test_scores_are_within_a_float32_rounding_of_the_true_inner_product():
    gallery, queries = unit_rows(500, 512, 9), unit_rows(20, 512, 10)
    ranking = exact_top_k(queries, gallery, 500)
    true = np.take_along_axis(queries.astype(np.float64) @ gallery.astype(np.float64).T, ranking.ids, axis=1)
    assert np.abs(ranking.scores - true).max() < 6e-8


def test_negative_and_zero_scores_are_ordered():
    gallery = np.array([[-1, 0], [0, 1], [1, 0], [0, -1], [-0.6, 0.8], [-0.8, 0.6]], np.float32)
    ranking = exact_top_k(np.array([[1, 0]], np.float32), gallery, 6)
    assert ranking.ids.tolist() == [[2, 1, 3, 4, 5, 0]]
    np.testing.assert_allclose(ranking.scores[0], [1, 0, 0, -0.6, -0.8, -1], atol=1e-7)


def test_nothing_to_ask_and_nothing_to_find():
    assert exact_top_k(np.empty((0, 4), np.float32), unit_rows(3, 4, 0), 2).ids.shape == (0, 2)
    empty = exact_top_k(unit_rows(3, 4, 0), np.empty((0, 4), np.float32), 2)
    assert empty.ids.tolist() == [[-1, -1]] * 3
    assert np.all(np.isneginf(empty.scores))


def test_a_memory_mapped_float16_gallery_is_read_in_blocks(tmp_path):
    rows = unit_rows(100, 8, 11, dtype=np.float16)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    queries = unit_rows(5, 8, 12)
    assert np.array_equal(exact_top_k(queries, mapped, 7, block=9).ids, exact_top_k(queries, rows, 7).ids)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.0])
def test_rows_that_are_not_about_unit_length_are_refused_on_either_side(bad):
    good, wrong = unit_rows(4, 3, 13), unit_rows(4, 3, 13)
    wrong[2, 1] = bad
    with pytest.raises(DataError, match="gallery: a row has length"):
        exact_top_k(good, wrong, 1)
    with pytest.raises(DataError, match="queries: a row has length"):
        exact_top_k(wrong, good, 1)


def test_arguments_out_of_bounds():
    rows = unit_rows(4, 3, 0)
    with pytest.raises(ValueError, match="at least 1: got 0"):
        exact_top_k(rows, rows, 0)
    with pytest.raises(DataError, match=r"\(4, 3\) and gallery \(4, 2\)"):
        exact_top_k(rows, rows[:, :2], 1)


def test_found_candidates_are_sorted_with_padding_last():
    scores = np.array([[0.5, -3e38, 0.5, 0.7]], np.float32)
    ranking = sorted_ranking(scores, np.array([[9, -1, 2, 4]]), 6)
    assert ranking.ids.tolist() == [[4, 2, 9, -1, -1, -1]]
    assert ranking.scores[0, :3].tolist() == [np.float32(0.7), 0.5, 0.5]
    assert np.all(np.isneginf(ranking.scores[0, 3:]))
    assert sorted_ranking(scores, np.array([[9, -1, 2, 4]]), 1).ids.tolist() == [[4]]


def test_minus_zero_and_zero_are_a_tie():
    for scores in ([-0.0, 0.0], [0.0, -0.0]):
        assert sorted_ranking(np.array([scores], np.float32), np.array([[1, 2]]), 2).ids.tolist() == [[1, 2]]


def test_check_unit_names_the_row_and_its_length():
    rows = unit_rows(5000, 4, 14)
    check_unit(rows, "rows")
    rows[4500] *= 1.01
    with pytest.raises(DataError, match=r"rows: row 4500 has length 1\.01"):
        check_unit(rows, "rows")
    rows[4500] = np.nan
    with pytest.raises(DataError, match="row 4500"):
        check_unit(rows, "rows")
    with pytest.raises(DataError, match="shape"):
        check_unit(rows[0], "rows")
