"""The classification in the loop: its terms, its labels, and that it goes on bit for bit."""

import logging

import numpy as np
import pytest
import tiny
import torch
from training import little

from clipdistill.losses.classification import class_distillation_loss, class_label_loss
from clipdistill.losses.objective import Embeddings, LossWeights, Objective, TeacherScale
from clipdistill.training.batch import Batch
from clipdistill.training.batches import TrainingData
from clipdistill.training.classes import LABELS, ClassLabels, ClassLoss
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(18))
CLASSES = np.stack([little.Teacher().row(f"class {number}") for number in range(3)])
NUMBERS = {pair.key: row % 3 for row, pair in enumerate(PAIRS) if row < 12}


def loss(distil=1.0, labels=1.0, temperature=2.0):
    return ClassLoss(CLASSES, 50.0, temperature=temperature, distil=distil, labels=labels)


def batch_of(student, known):
    pixels = torch.zeros(4, 3, 32, 32)
    teacher = torch.tensor(np.stack([little.Teacher().row(f"picture {row}") for row in range(4)]))
    none = torch.zeros(0, 1, dtype=torch.int64)
    return Batch(
        step=0,
        pixels=pixels,
        tokens=none,
        teacher_images=teacher,
        teacher_texts=torch.zeros(0, little.TEACHER_DIM),
        positives=torch.zeros(0, 0, dtype=torch.bool),
        pairs=0,
        keys=tuple("abcd"),
        texts=(),
        rejected=(),
        image_facts={LABELS: torch.tensor(known)},
    )


@pytest.mark.parametrize("dim", [16, little.TEACHER_DIM])
def test_the_terms_are_the_losses_of_the_student_in_the_teacher_s_space(dim):
    student, own = little.student(dim=dim), torch.nn.functional.normalize(torch.randn(4, dim), dim=1)
    batch, embedded = batch_of(student, [2, -1, 0, -1]), Embeddings(own, torch.zeros(0, dim))
    found = {term.name: term for term in loss(distil=0.5, labels=2.0).terms(student, batch, embedded)}
    classes = torch.tensor(CLASSES)
    logits = 50 * student.to_teacher(own, "image") @ classes.T
    expected = class_distillation_loss(logits, 50 * batch.teacher_images @ classes.T, 2.0)
    torch.testing.assert_close(found["class_distil"].value, expected)
    torch.testing.assert_close(found["class_labels"].value, class_label_loss(logits, torch.tensor([2, -1, 0, -1])))
    assert (found["class_distil"].weight, found["class_labels"].weight) == (0.5, 2.0)


def test_terms_without_weight_or_rows_are_left_out():
    student, own = little.student(), torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    embedded = Embeddings(own, torch.zeros(0, 16))
    names = [term.name for term in loss(distil=0.0).terms(student, batch_of(student, [1] * 4), embedded)]
    assert names == ["class_labels"]
    assert [one.name for one in loss().terms(student, batch_of(student, [-1] * 4), embedded)] == ["class_distil"]
    none = Embeddings(torch.zeros(0, 16), torch.zeros(0, 16))
    assert not list(loss().terms(student, batch_of(student, [1] * 4), none))


def test_the_scale_begins_at_the_teacher_s_and_is_held():
    assert loss().scale.value() == pytest.approx(50)
    high = ClassLoss(CLASSES, 120.0, temperature=1.0, distil=1.0, labels=0.0).scale
    assert high().item() == pytest.approx(120, rel=1e-5)
    for scale, most in ((high, 120), (loss().scale, 100)):
        with torch.no_grad():
            scale.logit_scale.fill_(9.0)
        scale().backward()
        assert scale.value() == pytest.approx(most, rel=1e-5)
        assert scale.logit_scale.grad is not None
    assert set(high.state_dict()) == {"logit_scale"}


def run(folder, steps=8, extra=None, weights=None, **changes):
    extra = extra or loss()
    student = little.student(dim=little.TEACHER_DIM)
    objective = Objective(weights or LossWeights(feature_cosine=1.0), TeacherScale(50.0, None), further=True)
    lines = []
    distill(
        student,
        little.Teacher(PAIRS),
        TrainingData(PAIRS),
        objective=objective,
        train=little.settings(steps=steps, **({"batch": 0, "batch_images": 6} | changes)),
        seed=3,
        folder=folder,
        extras=(extra,),
        facts=(ClassLabels(NUMBERS),),
        on_log=lines.append,
    )
    return student, extra, lines


def test_the_loop_learns_the_labels_and_the_scale(caplog):
    caplog.set_level(logging.ERROR)
    _, extra, lines = run(None, steps=40, extra=loss(distil=0.0, labels=1.0), lr=1e-2)
    values = [line["class_labels"] for line in lines if "class_labels" in line]
    assert np.mean(values[-4:]) < 0.5 * np.mean(values[:4])
    assert extra.scale.value() != pytest.approx(50, abs=1e-3)


def test_with_no_text_in_the_batch_the_text_tower_stays_bit_for_bit_as_it_began():
    before = little.student(dim=little.TEACHER_DIM).model.state_dict()
    student, _, lines = run(None, weights=LossWeights())
    after = student.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("visual", "logit_")) for name in changed)
    assert set(lines[0]) >= {"class_distil", "class_labels"}


def test_a_training_that_was_cut_ends_with_the_same_bits(tmp_path):
    whole, scale, _ = run(tmp_path / "whole", steps=6, weights=LossWeights())

    def stopping(student, step):
        raise KeyboardInterrupt

    student = little.student(dim=little.TEACHER_DIM)
    arguments = {
        "objective": Objective(LossWeights(), TeacherScale(50.0, None), further=True),
        "train": little.settings(steps=6, batch=0, batch_images=6),
        "seed": 3,
        "folder": tmp_path / "cut",
        "facts": (ClassLabels(NUMBERS),),
    }
    with pytest.raises(KeyboardInterrupt):
        distill(student, little.Teacher(PAIRS), TrainingData(PAIRS), extras=(loss(),), on_eval=stopping, **arguments)
    again, resumed, _ = run(tmp_path / "cut", steps=6, weights=LossWeights())
    assert resumed.scale.value() == scale.scale.value()
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name]), name
