import math

import numpy as np
import pytest
import torch
from losses_helpers import assert_matches_oracle

from clipdistill.losses.classification import class_distillation_loss, class_label_loss, class_logits


def softmax(row):
    powers = [math.exp(value - max(row)) for value in row]
    return [value / sum(powers) for value in powers]


def slow_divergence(student, teacher, temperature):
    total = 0.0
    for own, theirs in zip(student, teacher, strict=True):
        q, p = softmax([value / temperature for value in own]), softmax([value / temperature for value in theirs])
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def slow_cross_entropy(student, labels):
    known = [(row, label) for row, label in zip(student, labels, strict=True) if label >= 0]
    return -sum(math.log(softmax(row)[label]) for row, label in known) / len(known)


@pytest.fixture
def logits():
    rng = np.random.default_rng(3)
    return rng.normal(0, 3, (5, 4)), rng.normal(0, 3, (5, 4))


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
def test_the_divergence_is_a_slow_loop_s(logits, temperature):
    student, teacher = logits
    fixed = torch.tensor(teacher)
    assert_matches_oracle(
        lambda own: class_distillation_loss(own, fixed, temperature),
        lambda own: slow_divergence(own, teacher, temperature),
        [student],
    )


def test_a_perfect_student_has_no_divergence_and_the_teacher_no_gradient(logits):
    own, theirs = (torch.tensor(logits[0], requires_grad=True) for _ in range(2))
    loss = class_distillation_loss(own, theirs, 3.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    class_distillation_loss(own * 2, theirs).backward()
    assert theirs.grad is None
    assert own.grad.abs().max() > 1e-3


def test_a_number_added_to_every_class_s_logit_such_as_siglip_s_bias_changes_nothing(logits):
    student, teacher = map(torch.tensor, logits)
    assert torch.allclose(class_distillation_loss(student, teacher - 10), class_distillation_loss(student, teacher))


@pytest.mark.parametrize("labels", [[0, 3, 1, 1, 2], [-1, 3, -1, 0, -1]])
def test_the_cross_entropy_is_a_slow_loop_s_over_the_labelled_rows_alone(logits, labels):
    known = torch.tensor(labels)
    assert_matches_oracle(
        lambda own: class_label_loss(own, known), lambda own: slow_cross_entropy(own, labels), [logits[0]]
    )


def test_without_a_label_the_cross_entropy_is_0_and_attached(logits):
    own = torch.tensor(logits[0], requires_grad=True)
    loss = class_label_loss(own, torch.full((5,), -1))
    loss.backward()
    assert loss.item() == 0
    assert (own.grad == 0).all()


def test_logits_are_scaled_cosines():
    images, classes = torch.eye(3)[:2], torch.eye(3)
    assert class_logits(images, classes, 5.0).tolist() == [[5, 0, 0], [0, 5, 0]]
