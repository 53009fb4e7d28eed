from __future__ import annotations

import pytest
import tiny
import torch
from training import little, live_teachers

from clipdistill.cache import CachedMember, EnsembleCache
from clipdistill.cache.store import Views
from clipdistill.core import fingerprint
from clipdistill.towers.live import LiveTeacher
from clipdistill.training.batches import BatchMaker, TrainingData
from clipdistill.training.live import LiveEnsemble
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(12))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return [live_teachers.load(folder / kind, kind) for kind in ("clip", "siglip")]


@pytest.mark.parametrize("form", ["logits", "embeddings"])
def test_live_members_of_two_kinds_give_the_rows_of_their_caches(teachers, form, tmp_path):
    members = [
        CachedMember(str(n), live_teachers.cached(tmp_path / str(n), teacher, PAIRS), weight=n + 1.0)
        for n, teacher in enumerate(teachers)
    ]
    cache = EnsembleCache(tmp_path, members, form)
    live = LiveEnsemble([LiveTeacher(teacher) for teacher in teachers], cache.ensemble, Views())
    student = little.student()
    maker = BatchMaker(
        student.preprocess,
        student.tokenizer,
        live_teachers.NoRows(PAIRS),
        TrainingData(PAIRS),
        little.settings(batch=6, batch_texts=2),
        5,
        max_pixels=10**6,
        live=live,
    )
    batch = maker.make_batch(0)
    rows = live.rows(batch)
    torch.testing.assert_close(rows.images, torch.from_numpy(cache.image_rows(batch.keys)), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.texts, torch.from_numpy(cache.text_rows(batch.texts)), atol=1e-5, rtol=0)
    assert rows.images.shape == (6, cache.dim)
    assert rows.texts.shape == (8, cache.dim)
    assert cache.bias is None, "one of the two has none"


def test_a_live_training_with_two_teachers_goes_on_bit_for_bit(teachers, tmp_path):
    members = [CachedMember(str(n), live_teachers.cached(tmp_path / str(n), t, PAIRS)) for n, t in enumerate(teachers)]
    cache = EnsembleCache(tmp_path, members, "embeddings")  # as wide as the little student's projection

    def trained(folder=None, until=None):
        def on_log(line):
            if line["step"] == until:
                raise KeyboardInterrupt

        student, objective = little.student(), live_teachers.objective(teachers[0])
        distill(
            student,
            live_teachers.NoRows(PAIRS),
            TrainingData(PAIRS),
            objective=objective,
            train=little.settings(accumulation=2),
            seed=5,
            folder=folder,
            on_log=on_log,
            live=LiveEnsemble([LiveTeacher(teacher) for teacher in teachers], cache.ensemble, Views(2, 3)),
        )
        return fingerprint.of_tensors({**student.module.state_dict(), **objective.state_dict()})

    whole = trained()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", until=5)
    assert trained(tmp_path / "run") == whole
