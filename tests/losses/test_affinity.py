import math

import numpy as np
import oracles_losses as oracle
import pytest
import torch
from losses_helpers import assert_matches_oracle

from clipdistill.losses.affinity import affinity_loss


@pytest.fixture
def sides():
    """Five images and three texts, student width 4, teacher width 6."""
    generator = np.random.default_rng(5)
    student = oracle.unit_rows(generator, 5, 4), oracle.unit_rows(generator, 3, 4)
    teacher = oracle.unit_rows(generator, 5, 6), oracle.unit_rows(generator, 3, 6)
    return student, teacher


@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_value_and_gradients_match_the_oracle(sides, form, temperature):
    student, (p, q) = sides
    assert_matches_oracle(
        lambda u, v, s: affinity_loss(u, v, torch.tensor(p), torch.tensor(q), s, 12.0, temperature, form),
        lambda u, v, s: oracle.affinity(u, v, p, q, float(s), 12.0, temperature, form),
        [*student, np.array(5.0)],
    )


def gradients(sides, form, temperature=1.0):
    (u, v), (p, q) = sides
    u, v = (torch.tensor(side, requires_grad=True) for side in (u, v))
    loss = affinity_loss(u, v, torch.tensor(p), torch.tensor(q), 7.0, 9.0, temperature, form)
    loss.backward()
    return loss.item(), u.grad, v.grad


def test_kl_and_cross_entropy_differ_by_the_teachers_entropy_and_have_equal_gradients(sides):
    kl, *kl_gradients = gradients(sides, "kl", 2.0)
    cross, *cross_gradients = gradients(sides, "cross_entropy", 2.0)
    _, (p, q) = sides
    entropies = []
    for left, right in ((p, q), (q, p)):
        rows = [oracle.softmax_row(row) for row in oracle.logits_of(left, right, 9.0 / 2)]
        entropies.append(sum(-x * math.log(x) for row in rows for x in row) / len(rows))
    assert cross - kl == pytest.approx(4 * sum(entropies) / 2, rel=1e-10)
    for ours, theirs in zip(kl_gradients, cross_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_gradients_size_does_not_fall_with_the_temperature(sides):
    """T^2 undoes the two factors 1/T of a softened softmax: as T grows the gradient tends to a limit above zero."""
    norms = [gradients(sides, "kl", temperature)[1].norm().item() for temperature in (50.0, 500.0, 5000.0)]
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(norms[2], rel=0.01)


def test_temperature_scales_both_sides_logits(sides):
    (u, v), (p, q) = (tuple(map(torch.tensor, side)) for side in sides)
    torch.testing.assert_close(
        affinity_loss(u, v, p, q, 8.0, 12.0, temperature=4.0), 16 * affinity_loss(u, v, p, q, 2.0, 3.0)
    )


def test_a_perfect_student_costs_nothing_and_has_no_gradient(sides):
    _, (p, q) = sides
    u = torch.tensor(p, requires_grad=True)
    loss = affinity_loss(u, torch.tensor(q), torch.tensor(p), torch.tensor(q), 12.0, 12.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert u.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


def test_a_uniform_student_costs_the_log_of_the_candidates(sides):
    _, (p, q) = (tuple(map(torch.tensor, side)) for side in sides)
    u, v = torch.ones(5, 4, dtype=torch.float64) / 2, torch.ones(3, 4, dtype=torch.float64) / 2
    loss = affinity_loss(u, v, p, q, 10.0, 10.0, form="cross_entropy")
    assert loss.item() == pytest.approx((math.log(3) + math.log(5)) / 2, abs=1e-12)


def test_no_gradient_reaches_the_teacher(sides):
    (u, v), (p, q) = (tuple(torch.tensor(x, requires_grad=True) for x in side) for side in sides)
    affinity_loss(u, v, p, q, 5.0, 5.0).backward()
    assert p.grad is None
    assert q.grad is None


def test_the_order_of_images_and_of_texts_does_not_matter(sides):
    (u, v), (p, q) = (tuple(map(torch.tensor, side)) for side in sides)
    a, b = torch.tensor([4, 2, 0, 1, 3]), torch.tensor([2, 0, 1])
    torch.testing.assert_close(affinity_loss(u[a], v[b], p[a], q[b], 5.0, 9.0), affinity_loss(u, v, p, q, 5.0, 9.0))


def test_one_image_and_one_text_cost_nothing():
    row = torch.tensor([[0.6, 0.8]])
    assert affinity_loss(row, row, row, -row, 10.0, 10.0).item() == 0


def test_kl_is_finite_where_the_teacher_is_certain():
    u = torch.eye(3)
    assert affinity_loss(-u, u, u, u, 100.0, 1000.0).isfinite()
