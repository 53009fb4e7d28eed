import numpy as np
import oracles_retrieval as slow
import pytest
import pytrec_eval

from clipdistill.retrieval import measures
from clipdistill.retrieval.exact import exact_top_k


def random_case(seed, queries=60, gallery=25, depth=12):
    """Rankings with padding of all lengths, and a truth of one to five rows a query."""
    generator = np.random.default_rng(seed)

    def ranking():
        ids = np.stack([generator.permutation(gallery)[:depth] for _ in range(queries)])
        lengths = generator.integers(0, depth + 1, queries)
        return np.where(np.arange(depth) < lengths[:, None], ids, -1)

    relevant = [generator.choice(gallery, generator.integers(1, 6), replace=False).tolist() for _ in range(queries)]
    return ranking(), ranking(), relevant


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 3, 10, 12])
def test_measures_are_their_slow_definitions(seed, k):
    student, teacher, relevant = random_case(seed)
    np.testing.assert_array_equal(measures.success_at_k(student, relevant, k), slow.success(student, relevant, k))
    np.testing.assert_allclose(measures.recall_at_k(student, relevant, k), slow.recall(student, relevant, k))
    np.testing.assert_allclose(measures.overlap_at_k(student, teacher, k), slow.overlap(student, teacher, k))
    np.testing.assert_array_equal(
        measures.teacher_top1_at_k(student, teacher, k), slow.teacher_top1(student, teacher, k)
    )


def test_a_case_by_hand():
    ids = np.array([[3, 1, 0], [2, 0, -1], [-1, -1, -1]])
    relevant = [[0, 1], [1], [2]]
    assert measures.hits(ids, relevant).tolist() == [[False, True, True], [False] * 3, [False] * 3]
    assert measures.success_at_k(ids, relevant, 1).tolist() == [0, 0, 0]
    assert measures.success_at_k(ids, relevant, 2).tolist() == [1, 0, 0]
    assert measures.recall_at_k(ids, relevant, 2).tolist() == [0.5, 0, 0]
    assert measures.recall_at_k(ids, relevant, 3).tolist() == [1, 0, 0]


def test_padding_is_not_something_in_common():
    student, teacher = np.array([[3, -1, -1]]), np.array([[5, -1, -1]])
    assert measures.overlap_at_k(student, teacher, 3).tolist() == [0]
    assert measures.teacher_top1_at_k(student, teacher, 3).tolist() == [0]
    assert measures.rbo(student, teacher).tolist() == [0]
    nothing = np.full((1, 3), -1)
    assert measures.overlap_at_k(nothing, nothing, 3).tolist() == [0]
    assert measures.teacher_top1_at_k(nothing, nothing, 3).tolist() == [0]
    assert measures.rbo(nothing, nothing).tolist() == [0]


def test_overlap_is_over_what_is_available():
    student, teacher = np.array([[4, 1, 2, 0]]), np.array([[1, 4, -1, -1]])
    assert measures.overlap_at_k(student, teacher, 4).tolist() == [1]
    assert measures.overlap_at_k(teacher, student, 4).tolist() == [0.5]
    assert measures.overlap_at_k(student, teacher, 1).tolist() == [0]


def test_an_absent_query_scores_nothing_and_stays_in_the_mean():
    found = np.array([[0, 1], [-1, -1]])
    assert measures.success_at_k(found, [[0], [1]], 2).mean() == 0.5
    with pytest.raises(ValueError, match="1 queries, the ground truth 2"):
        measures.success_at_k(found[:1], [[0], [1]], 2)
    with pytest.raises(ValueError, match="1 queries, the teacher's 2"):
        measures.overlap_at_k(found[:1], found, 2)


def test_a_truth_without_rows_is_nothing_and_repeats_count_once():
    assert measures.recall_at_k(np.array([[0, 1]]), [[]], 2).tolist() == [0]
    assert measures.recall_at_k(np.array([[0, 1]]), [[1, 1, 7]], 2).tolist() == [0.5]


def test_a_shallow_or_repeating_ranking_is_refused():
    with pytest.raises(ValueError, match="top 5 of a ranking of shape"):
        measures.recall_at_k(np.array([[0, 1]]), [[0]], 5)
    with pytest.raises(ValueError, match="query 1 holds a gallery row twice"):
        measures.overlap_at_k(np.array([[0, 1], [2, 2]]), np.array([[0, 1], [2, 1]]), 2)


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_pytrec_evals(seed):
    """trec_eval ranks by score and, at ties, by document name descending: distinct scores leave that open."""
    ids, _, relevant = random_case(seed, depth=10)
    qrel = {f"q{i}": {f"d{row}": 1 for row in truth} for i, truth in enumerate(relevant)}
    run = {
        f"q{i}": {f"d{row}": float(100 - place) for place, row in enumerate(ranking) if row >= 0}
        for i, ranking in enumerate(ids)
    }
    judged = pytrec_eval.RelevanceEvaluator(qrel, {"recall.1,5,10", "success.1,5,10"}).evaluate(
        {query: documents for query, documents in run.items() if documents}
    )
    for k in (1, 5, 10):
        mine, any_hit = measures.recall_at_k(ids, relevant, k), measures.success_at_k(ids, relevant, k)
        for i in range(len(ids)):
            theirs = judged.get(f"q{i}", {f"recall_{k}": 0.0, f"success_{k}": 0.0})
            assert mine[i] == pytest.approx(theirs[f"recall_{k}"], abs=1e-12)
            assert any_hit[i] == theirs[f"success_{k}"]


@pytest.mark.parametrize("k", [1, 5, 10])
def test_success_is_clip_benchmarks_recall_in_both_directions(k):
    """Five captions a picture, as in COCO: their R@k is any of the five, not the share of them."""
    pictures = slow.unit_rows(40, 6, 0)
    texts = np.repeat(pictures, 5, axis=0) + 0.6 * slow.unit_rows(200, 6, 1)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    owner = np.repeat(np.arange(40), 5)
    scores = texts.astype(np.float64) @ pictures.astype(np.float64).T
    positive = owner[:, None] == np.arange(40)
    found = exact_top_k(texts, pictures, k).ids
    assert measures.success_at_k(found, owner[:, None].tolist(), k).mean() == pytest.approx(
        slow.clip_benchmark_recall(scores, positive, k)
    )
    back = exact_top_k(pictures, texts, k).ids
    relevant = [np.flatnonzero(owner == i).tolist() for i in range(40)]
    their = slow.clip_benchmark_recall(scores.T, positive.T, k)
    assert measures.success_at_k(back, relevant, k).mean() == pytest.approx(their)
    assert measures.recall_at_k(back, relevant, k).mean() < their


def test_rbo_of_equal_lengths_is_the_infinite_sum_with_the_last_agreement_going_on():
    generator = np.random.default_rng(3)
    student = np.stack([generator.permutation(14)[:10] for _ in range(20)])
    teacher = np.stack([generator.permutation(14)[:10] for _ in range(20)])
    for p in (0.5, 0.9, 0.98):
        wanted = [slow.rbo_infinite(a.tolist(), b.tolist(), p) for a, b in zip(student, teacher, strict=True)]
        np.testing.assert_allclose(measures.rbo(student, teacher, p=p), wanted, atol=1e-9)


@pytest.mark.parametrize("depth", [1, 4, 12])
def test_rbo_of_uneven_lengths_is_equation_32(depth):
    student, teacher, _ = random_case(5)
    wanted = [
        slow.rbo_uneven(slow.real(a[:depth]), slow.real(b[:depth]), 0.9) for a, b in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(measures.rbo(student, teacher, depth=depth), wanted, atol=1e-12)


def test_rbo_ends():
    rows = np.arange(12).reshape(1, 12)
    assert measures.rbo(rows, rows)[0] == pytest.approx(1)
    assert measures.rbo(rows, rows + 12)[0] == 0
    swapped_top, swapped_end = rows.copy(), rows.copy()
    swapped_top[0, :2] = [1, 0]
    swapped_end[0, -2:] = [11, 10]
    assert measures.rbo(swapped_top, rows)[0] < measures.rbo(swapped_end, rows)[0] < 1
    assert measures.rbo(swapped_top, rows)[0] == pytest.approx(measures.rbo(rows, swapped_top)[0])
    with pytest.raises(ValueError, match="between 0 and 1: got 1"):
        measures.rbo(rows, rows, p=1)


def test_retention():
    assert measures.retention(np.array([1.0, 0, 0, 0]), np.array([1.0, 1, 0, 0])) == 0.5
    assert np.isnan(measures.retention(np.array([1.0]), np.array([0.0])))
    with pytest.raises(ValueError, match="same queries"):
        measures.retention(np.zeros(2), np.zeros(3))


def test_the_bootstrap_is_the_slow_one_with_the_same_draws():
    generator = np.random.default_rng(4)
    student, teacher = generator.integers(0, 2, 30).astype(float), generator.integers(0, 2, 30).astype(float)
    draws = np.random.Generator(np.random.Philox(9)).integers(0, 30, size=(200, 30))
    found = measures.paired_bootstrap(student, teacher, seed=9, resamples=200)
    assert found == pytest.approx(slow.slow_bootstrap_ratio(student, teacher, draws))
    means = measures.bootstrap_means(student[:, None], seed=9, resamples=200)[:, 0]
    np.testing.assert_allclose(means, student[draws].mean(axis=1))
    assert measures.bootstrap_interval(student, seed=9, resamples=200) == pytest.approx(
        tuple(np.percentile(student[draws].mean(axis=1), [2.5, 97.5]))
    )


def test_the_bootstrap_depends_on_its_seed_alone():
    values = np.random.default_rng(5).random(1500)
    first = measures.bootstrap_interval(values, seed=1)
    np.random.seed(3)  # noqa: NPY002  (an ambient state that must not matter)
    assert measures.bootstrap_interval(values, seed=1) == first
    assert measures.bootstrap_interval(values, seed=2) != first


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    values = np.random.default_rng(6).random((50, 2))
    whole = measures.bootstrap_means(values, seed=3, resamples=100)
    monkeypatch.setattr(measures, "_DRAWN_AT_ONCE", 350)
    np.testing.assert_allclose(measures.bootstrap_means(values, seed=3, resamples=100), whole, atol=1e-15)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        teacher = (generator.random(150) < 0.6).astype(float)
        student = teacher * (generator.random(150) < 0.8)
        low, high = measures.paired_bootstrap(student, teacher, seed=trial, resamples=300)
        covered += low <= 0.8 <= high
    assert 180 <= covered <= 199


def test_pairing_makes_the_interval_narrower_than_two_independent_ones():
    generator = np.random.default_rng(8)
    teacher = (generator.random(400) < 0.5).astype(float)
    student = teacher * (generator.random(400) < 0.95)
    paired = np.subtract(*measures.paired_bootstrap(student, teacher, seed=0)[::-1])
    shuffled = np.subtract(*measures.paired_bootstrap(generator.permutation(student), teacher, seed=0)[::-1])
    assert paired < shuffled / 2


def test_undefined_intervals_are_nan():
    assert np.isnan(measures.paired_bootstrap(np.ones(5), np.zeros(5), seed=0)).all()
    assert np.isnan(measures.bootstrap_interval(np.empty(0), seed=0)).all()
    rare = np.zeros(3)
    rare[0] = 1
    low, high = measures.paired_bootstrap(rare, rare, seed=0)
    assert (low, high) == (1, 1)
