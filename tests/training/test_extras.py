from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from training import little

from clipdistill.core import fingerprint
from clipdistill.core.errors import MismatchError
from clipdistill.losses.objective import ExtraTerm
from clipdistill.training.batches import TrainingData
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(12))
DATA = TrainingData(PAIRS)
NUMBERS = {pair.key: float(number) for number, pair in enumerate(PAIRS)}


class Numbers:
    """Facts: a number a picture that depends on key and view, and each text's length."""

    def of_images(self, keys, views):
        return {"number": np.array([NUMBERS[key] + 100 * view for key, view in zip(keys, views, strict=True)])}

    def of_texts(self, texts):
        return {"length": np.array([len(text) for text in texts])}


FACTS = (Numbers(),)


class Reading:
    """An extra loss: a learned line through the student's embedding should give the picture's number."""

    def __init__(self, weight=0.5):
        self.weight, self.seen, self.watched = weight, [], []
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.learned = nn.Linear(16, 1)

    @contextmanager
    def watching(self, student):
        self.watched.append("begun")
        yield
        self.watched.append("ended")

    def terms(self, student, batch, embedded):
        assert embedded.images.requires_grad
        self.seen.append((batch.keys, batch.texts, batch.image_facts["number"], batch.text_facts["length"]))
        target = batch.image_facts["number"].float() / 10
        yield ExtraTerm("reading", self.weight, (self.learned(embedded.images)[:, 0] - target).square().mean())


def run(extra, student=None, *, folder=None, on_log=None, views=1, facts=FACTS, **train):
    student = student or little.student()
    return distill(
        student,
        little.Teacher(PAIRS, views),
        DATA,
        objective=little.objective(feature_cosine=1.0),
        train=little.settings(**train),
        seed=5,
        folder=folder,
        on_log=on_log,
        extras=[extra] if extra else [],
        facts=facts,
    )


def bits(student, extra):
    return fingerprint.of_tensors({**student.module.state_dict(), **extra.learned.state_dict()})


def test_its_term_is_a_part_of_the_loss_and_trains_what_it_learns_and_the_student():
    extra, lines = Reading(), []
    before = extra.learned.weight.clone()
    student = run(extra, on_log=lines.append, steps=30, lr=1e-2)
    assert all(
        line["loss"] == pytest.approx(line["feature_image"] + line["feature_text"] + 0.5 * line["reading"], abs=1e-5)
        for line in lines
    )
    assert lines[-1]["reading"] < lines[0]["reading"] / 2
    assert not torch.equal(extra.learned.weight, before)
    assert extra.watched == ["begun", "ended"]
    assert bits(student, extra) != bits(run(None, steps=30, lr=1e-2), extra)


def test_the_facts_are_those_of_the_batchs_rows_in_every_part():
    extra = Reading()
    run(extra, views=3, accumulation=2, steps=4, batch=6)
    assert [len(keys) for keys, *_ in extra.seen] == [3] * 8
    for keys, texts, numbers, lengths in extra.seen:
        assert [number % 100 for number in numbers.tolist()] == [NUMBERS[key] for key in keys]
        assert lengths.tolist() == [len(text) for text in texts]
    assert {number // 100 for *_, numbers, _ in extra.seen for number in numbers.tolist()} == {0, 1, 2}


def test_the_parts_gradients_are_averaged_for_it_too():
    found = {}

    def step(self, *arguments):
        found[parts] = extra.learned.weight.grad.clone()

    for parts in (1, 2, 4):
        extra = Reading()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            run(extra, little.student("test_vit"), steps=1, batch=8, accumulation=parts, grad_clip=0.0)
    torch.testing.assert_close(found[2], found[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found[4], found[1], atol=1e-6, rtol=1e-4)


def test_what_it_learned_is_checkpointed_and_resumed_bit_for_bit(tmp_path):
    def stop(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    whole = Reading()
    expected = bits(run(whole), whole)
    with pytest.raises(KeyboardInterrupt):
        run(Reading(), folder=tmp_path, on_log=stop)
    again = Reading()
    assert bits(run(again, folder=tmp_path), again) == expected
    with pytest.raises(MismatchError, match="names and shapes of tensors"):
        run(None, folder=tmp_path)


def test_a_loss_that_is_not_finite_is_skipped_whole():
    extra, lines = Reading(float("nan")), []
    before = extra.learned.weight.clone()
    student = little.student()
    weights = student.fingerprint
    run(extra, student, steps=2, on_log=lines.append)
    assert [line["skipped"] for line in lines] == [1, 2]
    assert torch.equal(extra.learned.weight, before)
    assert student.module.state_dict()["model.visual.trunk.bn1.num_batches_tracked"] == 0
    assert student.fingerprint == weights
