import numpy as np
import oracles_losses as oracle
import pytest
import torch

from clipdistill.losses.contrastive import matching_loss
from clipdistill.losses.gradient import clip_gradients, gradient_loss

POSITIVES = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=bool)


@pytest.fixture
def rows():
    generator = np.random.default_rng(15)
    return [oracle.unit_rows(generator, 4, 5) for _ in range(4)]


@pytest.mark.parametrize("positives", [np.eye(4, dtype=bool), POSITIVES], ids=["diagonal", "duplicates"])
def test_the_closed_form_is_autograds(rows, positives):
    u, v = (torch.tensor(side, requires_grad=True) for side in rows[:2])
    labels = torch.tensor(positives)
    wanted = torch.autograd.grad(matching_loss(9.0 * (u @ v.T), labels), (u, v))
    wanted += torch.autograd.grad(matching_loss(9.0 * (v @ u.T), labels.T), (u, v))
    for found, want in zip(clip_gradients(u, v, 9.0, labels), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("positives", [np.eye(4, dtype=bool), POSITIVES], ids=["diagonal", "duplicates"])
def test_the_value_matches_finite_differences_of_the_clip_loss(rows, positives):
    sides = map(torch.tensor, rows)
    found = gradient_loss(*sides, 9.0, 20.0, torch.tensor(positives))
    assert found.item() == pytest.approx(oracle.gradient_distance(*rows, 9.0, 20.0, positives), rel=1e-6)


def test_it_can_be_differentiated_again(rows):
    u, v, p, q = (torch.tensor(side, requires_grad=True) for side in rows)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(POSITIVES)
    assert torch.autograd.gradcheck(
        lambda u, v, scale: gradient_loss(u, v, p, q, scale, 20.0, labels), (u, v, scale), eps=1e-6, atol=1e-6
    )
    gradient_loss(u, v, p, q, scale, 20.0, labels).backward()
    assert p.grad is None
    assert q.grad is None


def test_a_copy_at_the_teachers_scale_costs_nothing_and_at_another_something(rows):
    _, _, p, q = map(torch.tensor, rows)
    labels = torch.eye(4).bool()
    assert gradient_loss(p, q, p, q, 20.0, 20.0, labels).item() == 0
    assert gradient_loss(p, q, p, q, 10.0, 20.0, labels).item() > 1e-4
