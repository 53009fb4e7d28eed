import math

import numpy as np
import pytest
import tiny
import torch

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.towers.ensemble import Ensemble, EnsembleTeacher, MemberFacts
from clipdistill.towers.teacher import load_teacher

MEMBERS = (
    MemberFacts("a", 6, 100.0, 3.0),
    MemberFacts("b", 4, 30.0, 1.0),
    MemberFacts("c", 9, 14.0, 2.0),
)


def unit(count, dim, seed):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def drawn(members, seed=0, counts=(7, 5)):
    """Pictures and texts of each member, in float64."""
    return [[unit(count, m.dim, [seed, side, n]) for n, m in enumerate(members)] for side, count in enumerate(counts)]


def combined(ensemble, rows):
    return ensemble.combine([torch.from_numpy(part) for part in rows]).numpy()


@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_the_rows_logits_are_the_weighted_mean_of_the_members(form):
    ensemble = Ensemble(MEMBERS, form)
    images, texts = drawn(MEMBERS)
    left, right = combined(ensemble, images), combined(ensemble, texts)
    wanted = np.zeros((7, 5))
    for member, picture, text in zip(MEMBERS, images, texts, strict=True):
        for i in range(7):
            for j in range(5):
                wanted[i, j] += member.weight / 6 * member.scale * sum(picture[i] * text[j])
    np.testing.assert_allclose(ensemble.scale * left @ right.T, wanted, atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(left, axis=1), 1, atol=1e-12)
    assert (ensemble.dim, ensemble.widest, left.shape) == (19, 9, (7, 19))
    assert math.isclose(ensemble.scale, (3 * 100 + 30 + 2 * 14) / 6)


def test_the_columns_hold_the_members_own_rows():
    ensemble = Ensemble(MEMBERS, "probabilities")
    images, _ = drawn(MEMBERS)
    rows = combined(ensemble, images)
    assert [(part.start, part.stop) for part in ensemble.columns] == [(0, 6), (6, 10), (10, 19)]
    for columns, member, share, own in zip(ensemble.columns, MEMBERS, ensemble.shares, images, strict=True):
        part = rows[:, columns]
        lengths = np.linalg.norm(part, axis=1)
        np.testing.assert_allclose(lengths**2, share * member.scale / ensemble.scale, atol=1e-12)
        np.testing.assert_allclose(part / lengths[:, None], own, atol=1e-12)


def test_the_feature_loss_of_the_concatenation_is_the_weighted_mean_of_the_members():
    ensemble = Ensemble(MEMBERS)
    images, _ = drawn(MEMBERS)
    imitated, _ = drawn(MEMBERS, seed=1)
    whole = 1 - (combined(ensemble, images) * combined(ensemble, imitated)).sum(axis=1)
    mean = 0
    for member, own, other in zip(MEMBERS, images, imitated, strict=True):
        mean = mean + member.weight * member.scale * (1 - (own * other).sum(axis=1))
    np.testing.assert_allclose(whole, mean / sum(m.weight * m.scale for m in MEMBERS), atol=1e-12)


def test_embeddings_are_averaged_by_weight_and_made_unit():
    members = (MemberFacts("a", 5, 100.0, 1.0), MemberFacts("b", 5, 20.0, 3.0))
    ensemble = Ensemble(members, "embeddings")
    images, _ = drawn(members)
    rows = combined(ensemble, images)
    for i, row in enumerate(rows):
        mean = 0.25 * images[0][i] + 0.75 * images[1][i]
        np.testing.assert_allclose(row, mean / math.sqrt(sum(mean**2)), atol=1e-12)
    assert (ensemble.dim, ensemble.widest, ensemble.scale) == (5, 5, 40.0)


def test_embeddings_that_cancel_out_are_refused():
    members = (MemberFacts("a", 4, 100.0), MemberFacts("b", 4, 100.0))
    row = unit(3, 4, 0)
    other = row.copy()
    other[1] *= -1
    with pytest.raises(DataError, match=r"row 1 cancel out.*teacher\.combine = \"logits\""):
        combined(Ensemble(members, "embeddings"), [row, other])
    assert combined(Ensemble(members, "embeddings"), [row[:0], other[:0]]).shape == (0, 4)


def test_only_the_proportions_of_the_weights_count():
    twice = tuple(MemberFacts(m.name, m.dim, m.scale, 2 * m.weight) for m in MEMBERS)
    images, _ = drawn(MEMBERS)
    np.testing.assert_array_equal(combined(Ensemble(MEMBERS), images), combined(Ensemble(twice), images))


def test_the_bias_is_the_weighted_mean_where_every_member_has_one():
    sigmoid = (MemberFacts("a", 4, 10.0, 1.0, -10.0), MemberFacts("b", 6, 20.0, 3.0, -16.0))
    ensemble = Ensemble(sigmoid)
    assert ensemble.bias == pytest.approx(-14.5)
    (images, texts), wanted = drawn(sigmoid), np.zeros((7, 5))
    for member, picture, text in zip(sigmoid, images, texts, strict=True):
        wanted += member.weight / 4 * (member.scale * picture @ text.T + member.bias)
    logits = ensemble.scale * combined(ensemble, images) @ combined(ensemble, texts).T + ensemble.bias
    np.testing.assert_allclose(logits, wanted, atol=1e-12)
    assert Ensemble((sigmoid[0], MemberFacts("c", 4, 100.0))).bias is None


def test_members_of_other_widths_cannot_be_averaged():
    with pytest.raises(ConfigError, match=r"a has 6, b has 4; set teacher\.combine = \"logits\" or \"probabilities\""):
        Ensemble(MEMBERS, "embeddings")


def test_out_of_range():
    for changes in ({"scale": 0.0}, {"scale": math.inf}, {"weight": -1.0}, {"weight": math.nan}):
        with pytest.raises(ConfigError, match=f"^a: {next(iter(changes))} must be a finite number above 0"):
            MemberFacts(**{"name": "a", "dim": 3, "scale": 1.0, **changes})
    with pytest.raises(ConfigError, match="bias must be finite"):
        MemberFacts("a", 3, 1.0, bias=math.nan)
    with pytest.raises(ConfigError, match="two teachers or more; got 1"):
        Ensemble(MEMBERS[:1])


def test_live_teachers_embed_as_one(tmp_path):
    teachers = [
        load_teacher(f"local-dir:{tiny.teacher_folder(tmp_path / str(seed), seed=seed, dim=dim)}")
        for seed, dim in ((0, 24), (1, 16))
    ]
    ensemble = Ensemble(tuple(MemberFacts(t.name, t.dim, t.scale) for t in teachers))
    whole = EnsembleTeacher(teachers, ensemble)
    pairs = tiny.pairs(5)
    pictures, texts = [pair.picture for pair in pairs], [pair.captions[0] for pair in pairs]
    images, words = whole.encode_images(pictures), whole.encode_texts(texts)
    assert images.dtype == words.dtype == np.float32
    mean = sum(t.scale / 2 * t.encode_images(pictures) @ t.encode_texts(texts).T for t in teachers)
    np.testing.assert_allclose(whole.scale * images @ words.T, mean, atol=1e-4)
    assert whole.dim == images.shape[1] == 40
    assert whole.parameters == sum(t.parameters for t in teachers)
    assert whole.fingerprint not in {t.fingerprint for t in teachers}
