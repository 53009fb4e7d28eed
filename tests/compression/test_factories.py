"""Compressed layouts: Hamming with rescoring against numpy, bytes against arithmetic, other rows in the same index."""

import faiss
import numpy as np
import pytest
from compression.made import DIM, GALLERY, sides

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.retrieval.exact import exact_top_k
from clipdistill.retrieval.index import VectorIndex

FACTORIES = ("Flat", "SQ8", "SQ4", "PQ32x4fs", "PQ32x4fs,Refine(SQ8)", "RaBitQ", "RaBitQ,Refine(SQ4)", "Binary,RFlat")
NAMES = tuple(f"p{row}" for row in range(GALLERY))


def build(factory, **given):
    return VectorIndex.build(sides().gallery, NAMES, factory=factory, encoder="e", **given)


def decoded_sq8(rows):
    """What 8-bit scalar quantisation keeps: each dimension's range in 256 cells, decoded to their middles."""
    low, high = rows.min(axis=0), rows.max(axis=0)
    codes = np.clip(np.floor((rows - low) / (high - low) * 255), 0, 255)
    return low + (codes + 0.5) / 255 * (high - low)


def test_binary_takes_candidates_by_hamming_distance_and_orders_them_by_what_is_stored():
    k, factor = 5, 4
    queries, gallery = sides().queries[:40], sides().gallery
    index = build("Binary,Refine(SQ8)", search_params={"k_factor_rf": factor})
    found = index.search(queries, k)
    stored = decoded_sq8(gallery.astype(np.float64))
    for row, query in enumerate(queries):
        distance = ((query >= 0) != (gallery >= 0)).sum(axis=1)
        last = np.sort(distance)[k * factor - 1]
        scores = stored @ query.astype(np.float64)
        ids = found.ids[row]
        assert (distance[ids] <= last).all()
        np.testing.assert_allclose(found.scores[row], scores[ids], atol=1e-3)
        sure = np.flatnonzero(distance < last)  # ties at the last distance may be taken or left
        better = [one for one in sure if scores[one] > scores[ids].min() + 2e-3]
        assert set(better) <= set(ids.tolist())


def test_binary_alone_has_no_scores_and_is_refused():
    with pytest.raises(ConfigError, match=r"Binary.*Say what rescores: Binary,Refine\(SQ8\)"):
        build("Binary")
    with pytest.raises(ConfigError, match="not usable"):
        build("Binary,Refine(SQ9)")


@pytest.mark.parametrize(
    ("factory", "codes"),
    [
        ("Flat", DIM * 4),
        ("SQfp16", DIM * 2),
        ("SQ8", DIM),
        ("SQ4", DIM / 2),
        ("RaBitQ", DIM / 8 + 8),
        ("Binary,Refine(SQ8)", DIM / 8 + DIM),
        ("Binary,RFlat", DIM / 8 + DIM * 4),
        ("PQ32x4fs,Refine(SQ8)", 16 + DIM),
    ],
)
def test_the_bytes_are_those_on_disk_with_what_rescores(tmp_path, factory, codes):
    index = build(factory)
    index.save(tmp_path / "index")
    assert index.bytes_per_vector == (tmp_path / "index" / "index.faiss").stat().st_size / GALLERY
    tables = 16 * DIM * 4 if factory.startswith("PQ") else 0
    # A few hundred bytes of headers and ranges; fast scan pads its rows to blocks of 32.
    assert codes <= index.bytes_per_vector <= codes + (tables + 1500) / GALLERY + (1 if tables else 0)


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_saved_index_searches_alike(tmp_path, factory):
    index = build(factory)
    index.save(tmp_path / "index")
    loaded = VectorIndex.load(tmp_path / "index", encoder="e")
    for one, other in zip(*(part.search(sides().queries, 5).ids for part in (index, loaded)), strict=True):
        assert one.tolist() == other.tolist()
    assert loaded.bytes_per_vector == index.bytes_per_vector


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_index_filled_again_keeps_its_training_and_holds_the_other_rows_alone(factory):
    index, other = build(factory), sides(seed=5)
    filled = index.refilled(other.gallery[:150], NAMES[:150])
    assert (len(filled), len(index), filled.search_params) == (150, GALLERY, index.search_params)
    own = index.refilled(sides().gallery, NAMES)
    wanted = index.search(sides().queries, 5)
    np.testing.assert_array_equal(own.search(sides().queries, 5).ids, wanted.ids)
    found = filled.search(other.queries, 5).ids
    exact = exact_top_k(other.queries, other.gallery[:150], 5).ids
    assert found.max() < 150
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.tolist(), exact.tolist(), strict=True)]) > 0.3


def test_filling_again_refuses_what_building_refuses():
    index = build("SQ8")
    with pytest.raises(MismatchError, match="dim"):
        index.refilled(np.eye(8, dtype=np.float32), NAMES[:8])
    with pytest.raises(DataError, match="ids"):
        index.refilled(sides().gallery, NAMES[:3])


def test_more_of_what_is_stored_finds_more():
    queries, gallery = sides().queries, sides().gallery
    exact = exact_top_k(queries, gallery, 10).ids

    def overlap(factory):
        ids = build(factory).search(queries, 10).ids
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids.tolist(), exact.tolist(), strict=True)])

    for coarse, fine in (("SQ4", "SQ8"), ("RaBitQ", "RaBitQ,Refine(SQ8)"), ("PQ32x4fs", "PQ32x4fs,RFlat")):
        assert overlap(coarse) < overlap(fine), (coarse, fine)
    assert overlap("Flat") == 1
    assert isinstance(build("Binary,RFlat")._faiss, faiss.IndexRefine)
