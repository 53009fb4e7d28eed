import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from clipdistill.cache import CachedMember, EnsembleCache, TeacherCache, Views, adopt, fill
from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Pair, Picture
from clipdistill.towers.teacher import load_teacher

VIEWS = Views(count=2, seed=5)
KEYS = [f"row/{number:03d}" for number in (3, 0, 11)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    return [
        load_teacher(f"local-dir:{tiny.teacher_folder(folder / str(seed), seed=seed, dim=dim)}")
        for seed, dim in ((0, 24), (1, 16), (2, 24))
    ]


@pytest.fixture(scope="module")
def caches(teachers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    return [fill(folder / str(n), t, tiny.pairs(12), views=VIEWS, shard_rows=5) for n, t in enumerate(teachers)]


def members(caches, **first):
    return [CachedMember(f"m{n}", cache, **(first if n == 0 else {})) for n, cache in enumerate(caches)]


def adopted(folder, count=12, dim=16, scale=50.0):
    """Embeddings that another tool made of ``tiny.pairs``: one row a picture and its first caption."""
    rng = np.random.default_rng(4)
    for part in ("img_emb", "text_emb"):
        (folder / part).mkdir(parents=True)
        rows = rng.standard_normal((count, dim)).astype(np.float32)
        np.save(folder / part / f"{part}_0.npy", rows)
    (folder / "metadata").mkdir()
    pairs = tiny.pairs(count)
    table = {"key": [pair.key for pair in pairs], "caption": [pair.captions[0] for pair in pairs]}
    pq.write_table(pa.table(table), folder / "metadata/metadata_0.parquet")
    return adopt(folder, pairs, logit_scale=scale)


@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_its_rows_logits_are_the_weighted_mean_in_every_view(caches, teachers, form, tmp_path):
    cache = EnsembleCache(tmp_path, members(caches[:2], weight=3.0, scale=40.0), form)
    texts = [pair.captions[1] for pair in tiny.pairs(4)]
    for views in (None, [1, 0, 1]):
        logits = cache.scale * cache.image_rows(KEYS, views) @ cache.text_rows(texts).T
        wanted = 0.75 * 40.0 * caches[0].image_rows(KEYS, views) @ caches[0].text_rows(texts).T
        wanted += 0.25 * teachers[1].scale * caches[1].image_rows(KEYS, views) @ caches[1].text_rows(texts).T
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert (cache.dim, cache.widest, cache.views) == (40, 24, 2)
    assert cache.view(KEYS[0], 1) == VIEWS.of(KEYS[0], 1)
    assert cache.mark(KEYS[0]) == caches[0].mark(KEYS[0])
    assert np.linalg.norm(cache.image_rows(KEYS), axis=1) == pytest.approx(1, abs=1e-6)


def test_averaged_embeddings_keep_the_width(caches, tmp_path):
    cache = EnsembleCache(tmp_path, members([caches[0], caches[2]]), "embeddings")
    mean = caches[0].image_rows(KEYS) + caches[2].image_rows(KEYS)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(cache.image_rows(KEYS), mean, atol=1e-6)
    assert cache.dim == 24
    with pytest.raises(ConfigError, match="m0 has 24, m1 has 16"):
        EnsembleCache(tmp_path, members(caches[:2]), "embeddings")


def test_the_agreement_of_spaces_is_a_mean_cosine_of_centred_rows(caches, tmp_path):
    cache = EnsembleCache(tmp_path, members([caches[0], caches[2]]), "embeddings")
    keys = [f"row/{number:03d}" for number in range(12)]
    rows = [caches[n].image_rows(keys) - caches[n].image_rows(keys).mean(axis=0) for n in (0, 2)]
    cosines = [one @ other / np.sqrt((one @ one) * (other @ other)) for one, other in zip(*rows, strict=True)]
    assert cache.agreement(keys) == pytest.approx(np.mean(cosines), abs=1e-5)
    same = EnsembleCache(tmp_path, members([caches[0], caches[0]]), "embeddings")
    assert same.agreement(keys) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="one width"):
        EnsembleCache(tmp_path, members(caches[:2])).agreement(keys)


def test_live_caches_and_adopted_embeddings_go_together(teachers, tmp_path):
    filled = fill(tmp_path / "a", teachers[0], tiny.pairs(12))
    cache = EnsembleCache(tmp_path, members([filled, adopted(tmp_path / "b")]))
    assert cache.scale == pytest.approx((teachers[0].scale + 50.0) / 2)
    assert cache.image_rows(KEYS).shape == (3, 40)
    assert cache.has_text(tiny.caption(0))
    assert not cache.has_text(f"{tiny.caption(0)} in a picture"), "only the filled member has it"
    with pytest.raises(DataError, match=r"in a picture"):
        cache.text_rows([f"{tiny.caption(0)} in a picture"])
    assert cache.facts["teacher"]["name"] == "0 + b"
    assert cache.facts["pictures"] == 12


def test_views_that_differ_are_refused_naming_the_member(caches, teachers, tmp_path):
    with pytest.raises(MismatchError, match=r"^m1: .*views\.count does not match: expected 2, found 1"):
        EnsembleCache(tmp_path, members([caches[0], adopted(tmp_path / "b")]))
    other = fill(tmp_path / "c", teachers[1], tiny.pairs(12), views=Views(count=2, seed=6))
    with pytest.raises(MismatchError, match=r"^m1: .*views\.seed does not match: expected 5, found 6"):
        EnsembleCache(tmp_path, members([caches[0], other]))


def test_the_fingerprint_knows_members_weights_scales_and_form(caches, tmp_path):
    prints = {
        EnsembleCache(tmp_path, rows, form).fingerprint
        for rows, form in (
            (members(caches[:2]), "logits"),
            (members(caches[:2]), "probabilities"),
            (members(caches[1::-1]), "logits"),
            (members(caches[:2], weight=2.0), "logits"),
            (members(caches[:2], scale=9.0), "logits"),
            (members(caches), "logits"),
        )
    }
    assert len(prints) == 6
    same = [CachedMember("another label", caches[0], weight=5.0), CachedMember("b", caches[1], weight=5.0)]
    assert EnsembleCache(tmp_path / "elsewhere", same).fingerprint in prints


def test_a_picture_that_one_member_refused_is_refused_once_for_all(teachers, tmp_path):
    broken = Pair("bad", Picture("bad.png", data=tiny.image_bytes(1)[:60]), ("a torn picture",))
    rows = [broken, *tiny.pairs(3)]
    both = [fill(tmp_path / str(n), teacher, rows) for n, teacher in enumerate(teachers[:2])]
    third = fill(tmp_path / "2", teachers[2], tiny.pairs(3), ["a torn picture"])
    cache = EnsembleCache(tmp_path, members([*both, third]))
    assert [row.key for row in cache.rejected] == ["bad"]
    assert not cache.has_image("bad")
    assert cache.has_image("row/000")
    assert cache.has_text("a torn picture")


def test_members_that_saw_different_pictures_are_refused(teachers, tmp_path):
    rows = tiny.pairs(3)
    changed = [*rows[:2], Pair(rows[2].key, Picture("x", data=tiny.image_bytes(77)), rows[2].captions)]
    cache = EnsembleCache(
        tmp_path, members([fill(tmp_path / "a", teachers[0], rows), fill(tmp_path / "b", teachers[1], changed)])
    )
    assert cache.mark(rows[0].key) is not None
    with pytest.raises(MismatchError, match=r"^m1: picture row/002: content seen by m0"):
        cache.mark(rows[2].key)


def test_a_lone_member_and_weights_out_of_range_are_refused(caches, tmp_path):
    with pytest.raises(ConfigError, match="two teachers or more"):
        EnsembleCache(tmp_path, members(caches[:1]))
    with pytest.raises(ConfigError, match="m0: weight must be a finite number above 0; got 0"):
        EnsembleCache(tmp_path, members(caches[:2], weight=0.0))
    with pytest.raises(ConfigError, match="m0: scale must be a finite number above 0; got -3"):
        EnsembleCache(tmp_path, members(caches[:2], scale=-3.0))


def test_a_moved_cache_is_the_same_member(caches, tmp_path):
    shutil.copytree(caches[0].folder, tmp_path / "moved")
    moved = EnsembleCache(tmp_path, members([TeacherCache.open(tmp_path / "moved"), caches[1]]))
    assert moved.fingerprint == EnsembleCache(tmp_path, members(caches[:2])).fingerprint
