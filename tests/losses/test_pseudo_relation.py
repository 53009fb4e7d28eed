import numpy as np
import oracles_losses as oracle
import pytest
import torch
from losses_helpers import assert_matches_oracle

from clipdistill.losses.pseudo_relation import TEMPERATURE, pseudo_relation_loss


@pytest.fixture
def rows():
    generator = np.random.default_rng(13)
    return [oracle.unit_rows(generator, 5, 6) for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_value_and_gradient_match_the_oracle(rows, temperature):
    u, p = rows
    assert_matches_oracle(
        lambda x: pseudo_relation_loss(x, torch.tensor(p), 12.0, temperature),
        lambda x: oracle.among(x, p, p, 12.0, temperature),
        [u],
    )


def test_a_copy_costs_nothing_and_no_gradient_reaches_the_teacher(rows):
    u, p = (torch.tensor(side, requires_grad=True) for side in rows)
    assert pseudo_relation_loss(p.detach(), p, 30.0).item() == pytest.approx(0, abs=1e-12)
    pseudo_relation_loss(u, p, 30.0).backward()
    assert p.grad is None
    assert u.grad.abs().max() > 1e-3


def test_one_row_has_no_relations():
    row = torch.tensor([[0.6, 0.8]])
    assert pseudo_relation_loss(-row, row, 30.0).item() == 0


def test_the_published_temperature_is_three():
    assert TEMPERATURE == 3.0
