import json
import shutil

import faiss
import numpy as np
import pytest
from oracles_retrieval import unit_rows

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.retrieval import factories, index
from clipdistill.retrieval.exact import exact_top_k
from clipdistill.retrieval.factories import resolve_factory
from clipdistill.retrieval.index import VectorIndex

COUNT, DIM = 600, 32
EXHAUSTIVE = [  # full vectors, and parameters with which every row is looked at
    ("Flat", {}),
    ("IVF16,Flat", {"nprobe": 16}),
    ("HNSW32", {"efSearch": COUNT}),
    ("HNSW32,Flat", {"efSearch": COUNT}),
    ("PQ8x4fs,RFlat", {"k_factor_rf": COUNT}),
    ("IVF8,PQ8x4fs,RFlat", {"nprobe": 8, "k_factor_rf": COUNT}),
    ("L2norm,Flat", {}),
]
COMPRESSED = [("SQ8", {}), ("SQfp16", {}), ("IVF8,SQ8", {"nprobe": 8}), ("PQ8", {}), ("IVF8,PQ16", {"nprobe": 8})]


def names(count):
    return [f"picture/{i:04d} ü\u2028" for i in range(count)]


def build(factory="Flat", count=COUNT, *, duplicates=60, seed=1, **more):
    vectors = unit_rows(count, DIM, seed, duplicates=duplicates)
    return vectors, VectorIndex.build(vectors, names(count), factory=factory, encoder="e" * 64, **more)


def assert_equal(found, wanted):
    assert np.array_equal(found.ids, wanted.ids)
    assert np.array_equal(found.scores, wanted.scores)


@pytest.mark.parametrize("k", [1, 10, 600, 640])
def test_flat_is_exact_search_bit_for_bit_with_ties_and_k_beyond_n(k):
    vectors, flat = build()
    queries = np.concatenate([unit_rows(300, DIM, 2), vectors[-40:]])
    assert_equal(flat.search(queries, k), exact_top_k(queries, vectors, k))


def test_flat_is_exact_where_more_rows_tie_than_faiss_is_asked_for():
    vectors = np.tile(unit_rows(2, 130, 3), (400, 1))
    flat = VectorIndex.build(vectors, names(800), encoder="e")
    queries = np.concatenate([unit_rows(20, 130, 4), vectors[:2]])
    assert_equal(flat.search(queries, 10), exact_top_k(queries, vectors, 10))


def test_flat_is_exact_where_float32_sums_tell_ties_apart():
    """Permutations of one row have the same inner product with a constant query, but not in float32, in order."""
    generator = np.random.default_rng(11)
    row = unit_rows(1, 256, 12)[0]
    vectors = np.stack([generator.permutation(row) for _ in range(300)])
    query = np.full((1, 256), 1 / 16, np.float32)
    assert len(np.unique((vectors * query).cumsum(axis=1)[:, -1])) > 1
    found = VectorIndex.build(vectors, names(300), encoder="e").search(query, 10)
    assert found.ids.tolist() == [list(range(10))]
    assert len(set(found.scores[0].tolist())) == 1


def test_one_query_gets_what_it_gets_in_company():
    _, flat = build()
    queries = unit_rows(40, DIM, 5)
    whole = flat.search(queries, 5)
    for row in (0, 39):
        alone = flat.search(queries[row : row + 1], 5)
        assert alone.ids.tolist() == whole.ids[row : row + 1].tolist()
        assert alone.scores.tolist() == whole.scores[row : row + 1].tolist()


@pytest.mark.parametrize(("factory", "params"), EXHAUSTIVE)
@pytest.mark.parametrize("k", [1, 10, COUNT + 7])
def test_exhaustive_searches_find_the_exact_ids_and_scores(factory, params, k):
    vectors, searched = build(factory, search_params=params)
    queries = np.concatenate([unit_rows(30, DIM, 6), vectors[-5:]])
    found, wanted = searched.search(queries, k), exact_top_k(queries, vectors, k)
    held = wanted.ids >= 0
    if "HNSW" in factory and k > COUNT:  # a graph's search may not reach every row; what it returns must be right
        held &= found.ids >= 0
        assert held.mean() > 0.9
    else:
        assert np.array_equal(found.ids >= 0, wanted.ids >= 0)
        np.testing.assert_allclose(found.scores[held], wanted.scores[held], atol=1e-6)
    every = exact_top_k(queries, vectors, COUNT)
    true = np.empty((len(queries), COUNT), np.float32)
    np.put_along_axis(true, every.ids, every.scores, axis=1)
    at_ids = np.take_along_axis(true, np.maximum(found.ids, 0), axis=1)
    np.testing.assert_allclose(found.scores[held], at_ids[held], atol=1e-6)
    assert_ordered(found)


def assert_ordered(found):
    """Score descending, then id ascending; padding at the end; no row twice."""
    for ids, scores in zip(found.ids.tolist(), found.scores.tolist(), strict=True):
        filled = sum(row >= 0 for row in ids)
        assert all(row == -1 for row in ids[filled:])
        assert all(score == -np.inf for score in scores[filled:])
        pairs = list(zip([-score for score in scores[:filled]], ids[:filled], strict=True))
        assert pairs == sorted(pairs)
        assert len(set(ids[:filled])) == filled


@pytest.mark.parametrize(("factory", "params"), COMPRESSED)
@pytest.mark.parametrize("k", [10, COUNT + 1])
def test_compressed_indexes_rank_by_inner_product_with_what_they_store(factory, params, k):
    _, searched = build(factory, search_params=params)
    queries = unit_rows(30, DIM, 7)
    raw = searched._faiss
    if hasattr(raw, "make_direct_map"):
        raw.make_direct_map()
    stored = np.stack([raw.reconstruct(row) for row in range(COUNT)])
    scores = queries.astype(np.float64) @ stored.astype(np.float64).T
    wanted = -np.sort(-scores, axis=1)[:, :k]
    found = searched.search(queries, k)
    np.testing.assert_allclose(found.scores[:, : wanted.shape[1]], wanted, atol=2e-4)
    at_ids = np.take_along_axis(scores, np.maximum(found.ids[:, :COUNT], 0), axis=1)
    np.testing.assert_allclose(found.scores[:, :COUNT], at_ids, atol=2e-4)
    assert_ordered(found)


def test_the_default_effort_finds_nearly_all_of_the_exact_neighbours():
    centres = unit_rows(40, DIM, 8)
    spread = np.random.default_rng(9).standard_normal((3000, DIM)) * 0.1 + centres[np.arange(3000) % 40]
    vectors = (spread / np.linalg.norm(spread, axis=1, keepdims=True)).astype(np.float32)
    queries = vectors[:100]
    wanted = exact_top_k(queries, vectors, 10).ids
    for factory in ("IVF64,Flat", "HNSW32", "IVF64,PQ8x4fs,RFlat", "SQ8"):
        found = VectorIndex.build(vectors, names(3000), factory=factory, encoder="e").search(queries, 10).ids
        shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), wanted.tolist(), strict=True)])
        assert shared > 0.93, factory


def test_default_parameters():
    def params(factory):
        return build(factory)[1].search_params

    assert params("Flat") == {}
    assert params("IVF16,Flat") == {"nprobe": 16}
    assert params("IVF4,PQ8x4fs,RFlat") == {"nprobe": 4, "k_factor_rf": 8}
    assert params("HNSW16") == {"efSearch": 128}
    assert params("PCA16,IVF8,SQ8") == {"nprobe": 8}
    big = VectorIndex.build(unit_rows(1100, DIM, 0), names(1100), factory="IVF512,Flat", encoder="e")
    assert big.search_params == {"nprobe": 32}
    assert faiss.extract_index_ivf(big._faiss).nprobe == 32


def test_auto_by_size():
    assert resolve_factory("auto", 1, 512) == "Flat"
    assert resolve_factory("Auto", 200_000, 512) == "Flat"
    assert resolve_factory("auto", 200_001, 512) == "IVF2048,Flat"
    assert resolve_factory("auto", 1_000_000, 512) == "IVF4096,Flat"
    assert resolve_factory("auto", 10_000_000, 512) == "IVF16384,PQ128x4fs,RFlat"
    assert resolve_factory("auto", 10_000_000, 257) == "IVF16384,Flat"
    assert resolve_factory(" HNSW32 ", 10_000_000, 512) == "HNSW32"


def test_every_layout_of_auto_builds_and_searches(monkeypatch):
    monkeypatch.setattr(
        factories, "AUTO", ((10, factories.AUTO[0][1]), (700, factories.AUTO[1][1]), (1e9, factories.AUTO[2][1]))
    )
    for count, resolved in ((10, "Flat"), (COUNT, "IVF128,Flat"), (800, "IVF128,PQ8x4fs,RFlat")):
        vectors, made = build("auto", count, duplicates=0)
        assert (made.factory, made.requested, len(made), made.dim) == (resolved, "auto", count, DIM)
        assert made.search(vectors[:5], 1).ids.tolist() == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("factory", ["Nope12", "", "PQ7", "LSH", "IDMap,Flat", "IMI2x3,Flat", "IVF"])
def test_a_factory_that_faiss_does_not_take_is_a_config_error(factory):
    with pytest.raises(ConfigError, match=r"index\.factory: ") as caught:
        build(factory)
    assert repr(factory) in str(caught.value)
    assert "IVF1024,Flat" in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_a_factory_that_would_silently_search_by_l2_is_refused():
    assert faiss.index_factory(32, "HNSW16,PQ8", faiss.METRIC_INNER_PRODUCT).metric_type == faiss.METRIC_L2
    with pytest.raises(ConfigError, match="does not search by inner product"):
        build("HNSW16,PQ8")


@pytest.mark.parametrize(("factory", "needed"), [("IVF1024,Flat", 1024), ("PQ8", 256), ("IVF4,PQ8", 256)])
def test_too_few_vectors_to_train_on_says_both_numbers(factory, needed):
    with pytest.raises(ConfigError, match=f"{factory}.*needs at least {needed} vectors.*there are 100"):
        build(factory, 100)


def test_faiss_writes_no_warning_of_its_own(capfd, caplog):
    build("IVF64,PQ8x4fs,RFlat", 300)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert "has 64 cells for 300 vectors" in caplog.text


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"nprobe": 8}, "an index Flat has no such parameter; it has: none"),
        ({"nprobe": 0}, "not a whole number"),
        ({"nprobe": "8"}, "not a whole number"),
    ],
)
def test_a_search_parameter_that_does_not_fit(params, message):
    with pytest.raises(ConfigError, match=f"index.search_params.nprobe.*{message}"):
        build(search_params=params)


def test_bad_vectors_and_ids():
    vectors = unit_rows(3, DIM, 0)
    with pytest.raises(DataError, match="'a' occurs twice"):
        VectorIndex.build(vectors, ["a", "b", "a"], encoder="e")
    with pytest.raises(DataError, match="3 vectors and 2 ids"):
        VectorIndex.build(vectors, ["a", "b"], encoder="e")
    with pytest.raises(DataError, match="no vectors"):
        VectorIndex.build(vectors[:0], [], encoder="e")
    with pytest.raises(DataError, match="row 0 has length 2"):
        VectorIndex.build(vectors * 2, ["a", "b", "c"], encoder="e")


def test_bad_queries():
    _, flat = build()
    with pytest.raises(MismatchError, match="dim does not match: expected 32, found 31"):
        flat.search(unit_rows(2, 31, 0), 1)
    with pytest.raises(DataError, match="queries: row 0 has length"):
        flat.search(unit_rows(2, DIM, 0) * 3, 1)
    with pytest.raises(ValueError, match="at least 1: got 0"):
        flat.search(unit_rows(2, DIM, 0), 0)
    for factory in ("Flat", "IVF4,Flat"):
        assert build(factory)[1].search(np.empty((0, DIM), np.float32), 3).ids.shape == (0, 3)


def test_float16_rows_are_taken():
    vectors = unit_rows(50, DIM, 0, dtype=np.float16)
    made = VectorIndex.build(vectors, names(50), encoder="e")
    assert_equal(made.search(vectors, 5), exact_top_k(vectors, vectors, 5))


def test_keys_leave_padding_out():
    vectors, flat = build(count=3, duplicates=0)
    assert flat.keys(flat.search(vectors[1:2], 5))[0][0] == names(3)[1]
    assert [len(row) for row in flat.keys(flat.search(vectors, 5))] == [3, 3, 3]


SAVED = [*EXHAUSTIVE, *COMPRESSED, ("IVF8,PQ8x4fs,Refine(SQfp16)", {}), ("PCA16,IVF8,PQ8", {}), ("PCA16,SQ8", {})]


@pytest.mark.parametrize(("factory", "params"), SAVED)
def test_a_saved_index_answers_as_before(tmp_path, factory, params):
    _, made = build(factory, search_params=params)
    made.save(tmp_path / "index")
    limits = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    again = VectorIndex.load(tmp_path / "index", encoder="e" * 64)
    assert limits == (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit())
    queries = unit_rows(20, DIM, 10)
    assert_equal(again.search(queries, 9), made.search(queries, 9))
    assert again.keys(again.search(queries, 2)) == made.keys(made.search(queries, 2))
    assert (again.factory, again.requested, again.encoder) == (made.factory, made.requested, made.encoder)
    assert again.search_params == made.search_params


@pytest.fixture
def saved(tmp_path):
    build("IVF8,Flat")[1].save(tmp_path / "index")
    return tmp_path / "index"


def test_the_manifest_says_what_the_index_is(saved):
    facts = json.loads((saved / "manifest.json").read_text())
    assert facts["kind"] == "index"
    assert (facts["count"], facts["dim"], facts["metric"]) == (COUNT, DIM, "inner_product")
    assert (facts["factory"], facts["resolved_factory"], facts["encoder"]) == ("IVF8,Flat", "IVF8,Flat", "e" * 64)
    assert sorted(facts["files"]) == ["ids.jsonl", "index.faiss"]
    assert facts["libraries"]["faiss-cpu"] == faiss.__version__


def test_two_builds_write_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        build("IVF8,PQ8x4fs,RFlat")[1].save(tmp_path / name)
    for file in ("index.faiss", "ids.jsonl", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_encoder_is_refused_naming_both(saved):
    with pytest.raises(MismatchError, match=f"encoder does not match: expected other, found {'e' * 64}"):
        VectorIndex.load(saved, encoder="other")
    assert len(VectorIndex.load(saved, encoder=None)) == COUNT


@pytest.mark.parametrize("file", ["index.faiss", "ids.jsonl"])
def test_a_changed_file_is_refused_before_faiss_reads_it(saved, file, monkeypatch):
    def never(*_):
        raise AssertionError("FAISS was handed a file that is not proven")

    monkeypatch.setattr(faiss, "read_index", never)
    data = bytearray((saved / file).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / file).write_bytes(bytes(data))
    with pytest.raises(MismatchError, match=rf"{file}: sha256 does not match.*clipdistill index"):
        VectorIndex.load(saved, encoder=None)
    (saved / file).unlink()
    with pytest.raises(MismatchError, match="found no file"):
        VectorIndex.load(saved, encoder=None)


def test_a_torn_or_missing_manifest_says_how_to_rebuild(saved, tmp_path):
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match="clipdistill index"):
        VectorIndex.load(saved, encoder=None)
    (saved / "manifest.json").unlink()
    with pytest.raises(DataError, match="clipdistill index"):
        VectorIndex.load(saved, encoder=None)
    with pytest.raises(DataError, match="clipdistill index"):
        VectorIndex.load(tmp_path / "nowhere", encoder=None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 5, "count does not match: expected 5, found 600"),
        ("dim", 8, "dim does not match: expected 8, found 32"),
        ("metric", "l2", "metric does not match: expected l2, found inner_product"),
        ("kind", "student", "kind does not match"),
        ("version", 99, "version does not match"),
        ("files", {}, "files does not match"),
        ("load_bytes", None, "load_bytes does not match: expected a value, found none"),
    ],
)
def test_a_manifest_that_says_something_else_is_a_mismatch(saved, field, value, message):
    facts = json.loads((saved / "manifest.json").read_text())
    facts[field] = value
    if value is None:
        del facts[field]
    (saved / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(MismatchError, match=message):
        VectorIndex.load(saved, encoder=None)


def test_search_parameters_come_from_the_manifest(saved):
    facts = json.loads((saved / "manifest.json").read_text())
    assert facts["search_params"] == {"nprobe": 8}
    (saved / "manifest.json").write_text(json.dumps({**facts, "search_params": {"nprobe": 3}}))
    loaded = VectorIndex.load(saved, encoder=None)
    assert loaded.search_params == {"nprobe": 3}
    assert faiss.extract_index_ivf(loaded._faiss).nprobe == 3


def test_a_file_that_faiss_cannot_read_is_a_data_error_within_its_own_size(saved):
    seen = []
    path = saved / "index.faiss"
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(data[: len(data) // 2]))
    limits = faiss.get_deserialization_vector_byte_limit()
    with pytest.raises(DataError, match="FAISS cannot read it"):
        index._read(path, 10**12)
    assert faiss.get_deserialization_vector_byte_limit() == limits
    with index._limits(vector_bytes=123, loops=7):
        seen = [faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()]
    assert seen == [123, 7]


def test_save_replaces_an_index_and_nothing_else(saved):
    build("Flat", 30, duplicates=0)[1].save(saved)
    assert len(VectorIndex.load(saved, encoder=None)) == 30
    (saved / "thesis.txt").write_text("ten years of work")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        build("Flat", 30, duplicates=0)[1].save(saved)
    assert (saved / "thesis.txt").exists()
    shutil.rmtree(saved)


def test_folders_may_be_strings(tmp_path):
    vectors, flat = build(count=50, duplicates=0)
    flat.save(str(tmp_path / "index"))
    again = VectorIndex.load(str(tmp_path / "index"), encoder="e" * 64)
    assert_equal(again.search(vectors, 5), flat.search(vectors, 5))
