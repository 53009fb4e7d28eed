import math

import numpy as np
import oracles_losses as oracle
import pytest
import torch
from losses_helpers import assert_matches_oracle

from clipdistill.losses.batch import Member
from clipdistill.losses.queue import queue_loss


@pytest.fixture
def rows():
    generator = np.random.default_rng(14)
    return [oracle.unit_rows(generator, count, 6) for count in (3, 3, 7)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_match_the_oracle(rows, temperature):
    u, p, stored = rows
    assert_matches_oracle(
        lambda x: queue_loss(x, torch.tensor(p), torch.tensor(stored), 12.0, temperature),
        lambda x: oracle.among(x, p, stored, 12.0, temperature),
        [u],
    )


def test_members_probabilities_are_averaged(rows):
    u, p, stored = rows
    members = [(slice(0, 2), 9.0, 1.0), (slice(2, 6), 15.0, 3.0)]
    found = queue_loss(*map(torch.tensor, rows), 12.0, 2.0, tuple(Member(*each) for each in members))
    target = oracle.mixture(p, stored, members, temperature=2.0)
    wanted = 0.0
    for row, probabilities in zip(oracle.logits_of(u, stored, 12.0 / 2.0), target, strict=True):
        wanted += sum(t * math.log(t / s) for t, s in zip(probabilities, oracle.softmax_row(row), strict=True))
    assert found.item() == pytest.approx(4 * wanted / len(u), rel=1e-10)


def test_a_copy_costs_nothing_and_no_gradient_reaches_the_teacher(rows):
    u, p, stored = (torch.tensor(side, requires_grad=True) for side in rows)
    assert queue_loss(p.detach(), p, stored, 40.0).item() == pytest.approx(0, abs=1e-12)
    queue_loss(u, p, stored, 40.0).backward()
    assert p.grad is None
    assert stored.grad is None
    assert u.grad.abs().max() > 1e-3


def test_the_order_of_the_queue_does_not_matter(rows):
    u, p, stored = map(torch.tensor, rows)
    turned = stored[torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(queue_loss(u, p, turned, 12.0), queue_loss(u, p, stored, 12.0))
