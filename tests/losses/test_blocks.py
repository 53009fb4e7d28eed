import numpy as np
import pytest
import torch
from losses_helpers import assert_matches_oracle

from clipdistill.losses.blocks import block_loss


def rows(seed, shape=(3, 2, 5)):
    return np.random.default_rng(seed).standard_normal(shape) * 3 + 1


def slow_cosine(student, teacher):
    apart = [
        1 - np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for one, other in zip(student, teacher, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return float(np.mean(apart))


def slow_mse(student, teacher):
    apart = [
        np.mean((a - (b - b.mean()) / np.sqrt(b.var() + 1e-5)) ** 2)
        for one, other in zip(student, teacher, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return float(np.mean(apart))


@pytest.mark.parametrize(("form", "slow"), [("cosine", slow_cosine), ("mse", slow_mse)])
def test_value_and_gradient_match_the_oracle(form, slow):
    teacher = rows(1)
    assert_matches_oracle(lambda x: block_loss(x, torch.tensor(teacher), form), lambda x: slow(x, teacher), [rows(0)])


@pytest.mark.parametrize("form", ["cosine", "mse"])
def test_the_teachers_scale_plays_no_part_and_it_gets_no_gradient(form):
    student, teacher = torch.tensor(rows(0), requires_grad=True), torch.tensor(rows(1), requires_grad=True)
    loss = block_loss(student, teacher, form)
    torch.testing.assert_close(block_loss(student, 1000 * teacher, form), loss, rtol=1e-5, atol=0)
    loss.backward()
    assert teacher.grad is None
    assert student.grad.any()


@pytest.mark.parametrize("form", ["cosine", "mse"])
def test_no_rows_cost_nothing_and_still_have_a_gradient(form):
    student = torch.zeros(0, 2, 5, requires_grad=True)
    loss = block_loss(student, torch.zeros(0, 2, 5), form)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 2, 5)
