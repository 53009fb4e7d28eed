import numpy as np
import oracles_losses as oracle
import pytest
import torch
from losses_helpers import assert_matches_oracle

from clipdistill.losses.feature import cosine_loss, mse_loss

LOSSES = {"cosine": (cosine_loss, oracle.one_minus_cosine), "mse": (mse_loss, oracle.mse)}


@pytest.fixture
def rows():
    generator = np.random.default_rng(7)
    return oracle.unit_rows(generator, 4, 6), oracle.unit_rows(generator, 4, 6)


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_match_the_oracle(rows, name):
    loss, expected = LOSSES[name]
    u, p = rows
    assert_matches_oracle(lambda x: loss(x, torch.tensor(p)), lambda x: expected(x, p), [u])


@pytest.mark.parametrize("dim", [3, 512, 768])
def test_the_published_mse_weight_is_a_weight_on_cosine(dim):
    generator = np.random.default_rng(dim)
    raw = torch.tensor(generator.standard_normal((5, dim)), requires_grad=True)
    p = torch.tensor(oracle.unit_rows(generator, 5, dim))
    u = torch.nn.functional.normalize(raw, dim=1)
    squared, cosine = 2000 * mse_loss(u, p), 4000 / dim * cosine_loss(u, p)
    torch.testing.assert_close(squared, cosine, rtol=1e-10, atol=1e-12)
    of_squared, of_cosine = (torch.autograd.grad(loss, raw, retain_graph=True)[0] for loss in (squared, cosine))
    torch.testing.assert_close(of_squared, of_cosine, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_cost_exactly_nothing_and_still_have_a_gradient(name):
    u = torch.zeros(0, 6, requires_grad=True)
    loss = LOSSES[name][0](u, torch.zeros(0, 6))
    loss.backward()
    assert loss.item() == 0
    assert u.grad.shape == (0, 6)


def test_cosine_runs_from_zero_to_two(rows):
    u = torch.tensor(rows[0])
    assert cosine_loss(u, u).item() == pytest.approx(0, abs=1e-12)
    assert cosine_loss(u, -u).item() == pytest.approx(2, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teacher_and_order_does_not_matter(rows, name):
    loss = LOSSES[name][0]
    u, p = (torch.tensor(side, requires_grad=True) for side in rows)
    loss(u, p).backward()
    assert p.grad is None
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(u[order], p[order]), loss(u, p))
