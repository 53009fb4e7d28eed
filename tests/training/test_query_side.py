"""Training a text tower alone: against the teacher's own pictures, of which none is ever read."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from training import little

from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError
from clipdistill.data.records import Picture
from clipdistill.losses.objective import Embeddings, LossWeights, Objective, Targets, TeacherScale
from clipdistill.losses.pseudo_relation import pseudo_relation_loss
from clipdistill.losses.queue import queue_loss
from clipdistill.towers.encoder import SearchedTeacher
from clipdistill.towers.query import TextModel
from clipdistill.towers.student import DualEncoder, assemble, projections
from clipdistill.training.batches import BatchMaker, TrainingData
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(12))
DATA = TrainingData(PAIRS, texts=("a text of its own", "and another"))


@pytest.fixture(autouse=True)
def unreadable_pictures(monkeypatch):
    def refuse(self):
        raise AssertionError(f"{self.origin} was read")

    monkeypatch.setattr(Picture, "read", refuse)


class Teacher(little.Teacher):
    def __init__(self, views=1):
        super().__init__((), views)  # without the marks, which need the pictures


def student(dim=little.TEACHER_DIM):
    words = little.tokenizer()
    text = {"context_length": 16, "vocab_size": words.vocab_size, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": dim, "custom_text": True, "text_cfg": text}
    maps = None if dim == little.TEACHER_DIM else projections(dim, little.TEACHER_DIM, 0, sides=("text",))
    model = assemble(cfg, 0)
    assert isinstance(model, TextModel)
    return DualEncoder(model, cfg, words, None, projection=maps, searches=SearchedTeacher("t", "f"))


def run(made=None, *, data=DATA, objective=None, views=1, **options):
    train = little.settings(**{key: value for key, value in options.items() if key not in ("folder", "on_log")})
    kept = {key: value for key, value in options.items() if key in ("folder", "on_log")}
    return distill(
        made or student(),
        Teacher(views),
        data,
        objective=objective or little.objective(),
        train=train,
        seed=5,
        **kept,
    )


def weights(made) -> str:
    return fingerprint.of_tensors(made.module.state_dict())


def cosine(made) -> float:
    texts = [text for pair in PAIRS for text in pair.captions]
    rows = made.to_teacher_vectors(made.encode_texts(texts), "text")
    return float((rows * Teacher().text_rows(texts)).sum(1).mean())


@pytest.mark.parametrize("dim", [24, 16])
def test_it_learns_the_teachers_texts_and_reads_no_picture(dim):
    made, lines = student(dim), []
    assert cosine(made) < 0.3
    run(made, steps=120, batch=8, batch_texts=8, lr=1e-2, log_every=40, eval_every=1000, on_log=lines.append)
    assert cosine(made) > 0.5
    assert {"clip", "affinity", "interactive", "feature_text"} <= set(lines[0])
    assert "feature_image" not in lines[0]  # it would be the teacher's rows against themselves


def test_texts_alone_need_no_pairs_at_all():
    made = student()
    objective = little.objective(feature_cosine=1.0)
    run(made, data=TrainingData((), texts=DATA.texts), objective=objective, batch=0, batch_texts=2, steps=3)
    with pytest.raises(ConfigError, match=r"loss\.clip needs pictures paired with texts"):
        run(made, objective=little.objective(clip=1.0), batch=0, batch_texts=2, steps=3)


@pytest.mark.parametrize("dim", [24, 16])
def test_the_loss_is_that_of_its_texts_against_the_teachers_pictures(dim):
    """The first step's terms, measured again from the batch: the student's images are the teacher's rows."""
    made, lines = student(dim), []
    maker = BatchMaker(
        None, made.tokenizer, Teacher(), DATA, little.settings(batch=6, batch_texts=3), 5, max_pixels=10**6
    )
    batch = maker.make_batch(0)
    assert batch.pixels.shape == (6, 3, 0, 0)
    rows = torch.from_numpy(Teacher().image_rows(batch.keys, [0] * 6))
    assert torch.equal(batch.teacher_images, rows)
    with torch.no_grad():
        texts = made.to_teacher(made.embed_tokens(batch.tokens), "text")
        embedded = Embeddings(rows, texts)
        targets = Targets(Embeddings(rows, batch.teacher_texts), batch.positives, batch.pairs, own_images=False)
        wanted = little.objective()(embedded, embedded, targets)
    run(made, batch=6, batch_texts=3, steps=1, on_log=lines.append)
    for name, value in wanted.parts.items():
        assert lines[0][name] == pytest.approx(float(value), rel=1e-5), name
    assert lines[0]["loss"] == pytest.approx(float(wanted.total), rel=1e-5)


def test_all_the_losses_but_those_of_pictures_alone_train_it():
    names = ("siglip", "feature_mse", "vertical", "cross", "gradient", "augmented_feature", "pseudo_relation", "queue")
    weights = LossWeights(**dict.fromkeys(names, 1.0), queue_rows=8)
    objective = Objective(weights, TeacherScale(50.0, None), dim=little.TEACHER_DIM, teacher_dim=little.TEACHER_DIM)
    draw = np.random.default_rng(0)
    rows = [torch.from_numpy(draw.standard_normal((count, 24)).astype(np.float32)) for count in (5, 5, 8, 6)]
    images, texts, queued, mine = (torch.nn.functional.normalize(part, dim=1) for part in rows)
    mine, stored = mine[:5].requires_grad_(), Embeddings(images, texts)
    targets = Targets(stored, torch.eye(5).bool(), 5, Embeddings(queued, queued), own_images=False)
    own = Embeddings(images, mine)
    terms = objective(own, own, targets)
    assert set(terms.parts) == {*names, "feature_text"} - {"feature_mse"}
    assert float(terms.parts["pseudo_relation"]) == pytest.approx(pseudo_relation_loss(mine, texts, 50.0).item())
    assert float(terms.parts["queue"]) == pytest.approx(queue_loss(mine, texts, queued, 50.0).item() / 2)
    terms.total.backward()
    assert mine.grad is not None and bool(mine.grad.any())


def test_parts_of_a_batch_and_views_of_pictures_go_through():
    whole = run(batch=6, batch_texts=4, accumulation=2, views=3, steps=4)
    again = run(batch=6, batch_texts=4, accumulation=2, views=3, steps=4)
    assert weights(whole) == weights(again)
    assert weights(whole) != weights(run(batch=6, batch_texts=4, accumulation=2, steps=4))


def test_cut_short_it_goes_on_and_ends_with_the_same_bits(tmp_path):
    whole = run(batch=6, batch_texts=4, steps=8, folder=tmp_path / "whole")

    def stop(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(batch=6, batch_texts=4, steps=8, folder=tmp_path / "cut", on_log=stop)
    cut = run(batch=6, batch_texts=4, steps=8, folder=tmp_path / "cut")
    assert weights(cut) == weights(whole)
    best = DualEncoder.load(tmp_path / "cut/best")
    assert np.array_equal(best.encode_texts(DATA.texts), cut.encode_texts(DATA.texts))


def test_workers_change_nothing():
    assert weights(run(batch=6, steps=3, workers=1)) == weights(run(batch=6, steps=3))
