import math

import numpy as np
import oracles_losses as oracle
import pytest
import torch
from losses_helpers import assert_matches_oracle

from clipdistill.losses.contrastive import clip_loss, matching_loss, siglip_loss

DUPLICATES = np.array(
    [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0, 1, 0, 0, 1]], dtype=bool
)  # not symmetric: text 1 describes image 4, yet text 4 does not describe image 1
POSITIVES = {"diagonal": np.eye(5, dtype=bool), "duplicates": DUPLICATES}


@pytest.fixture
def sides():
    generator = np.random.default_rng(3)
    return oracle.unit_rows(generator, 5, 4), oracle.unit_rows(generator, 5, 4)


@pytest.mark.parametrize("kind", POSITIVES)
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_clip_loss_value_and_gradients_match_the_oracle(sides, kind, scale):
    positives = POSITIVES[kind]
    assert_matches_oracle(
        lambda u, v, s: clip_loss(u, v, s, torch.tensor(positives)),
        lambda u, v, s: oracle.clip(u, v, float(s), positives),
        [*sides, np.array(scale)],
    )


@pytest.mark.parametrize("kind", POSITIVES)
def test_siglip_loss_value_and_gradients_match_the_oracle(sides, kind):
    positives = POSITIVES[kind]
    assert_matches_oracle(
        lambda u, v, s, b: siglip_loss(u, v, s, b, torch.tensor(positives)),
        lambda u, v, s, b: oracle.siglip(u, v, float(s), float(b), positives),
        [*sides, np.array(10.0), np.array(-2.5)],
    )


def test_clip_loss_with_single_positives_is_plain_cross_entropy(sides):
    u, v = map(torch.tensor, sides)
    logits, labels = 20 * u @ v.T, torch.arange(5)
    plain = (
        torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
    ) / 2
    torch.testing.assert_close(clip_loss(u, v, 20.0, torch.eye(5).bool()), plain)


def test_equal_embeddings_cost_the_log_of_the_batch_size():
    same = torch.ones(7, 4, dtype=torch.float64) / 2
    assert clip_loss(same, same, 100.0, torch.eye(7).bool()).item() == pytest.approx(math.log(7), abs=1e-12)
    assert clip_loss(same, same, 100.0, torch.ones(7, 7).bool()).item() == pytest.approx(math.log(7), abs=1e-12)


def test_multi_positive_minimum_is_the_targets_entropy():
    positives = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    logits = torch.where(positives, 0.0, -1e4).double()
    assert matching_loss(logits, positives).item() == pytest.approx(2 / 3 * math.log(2), abs=1e-12)


def test_siglip_of_zero_logits_is_log_two_for_every_text():
    u = torch.eye(4, dtype=torch.float64)[:3]
    assert siglip_loss(u, u.roll(1, dims=1), 0.0, 0.0, torch.eye(3).bool()).item() == pytest.approx(3 * math.log(2))


def test_one_pair_costs_nothing_to_match_but_something_to_score():
    row = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    only = torch.ones(1, 1).bool()
    assert clip_loss(row, row, 10.0, only).item() == 0
    assert siglip_loss(row, row, 10.0, -10.0, only).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "loss", [lambda u, v, z: clip_loss(u, v, 9.0, z), lambda u, v, z: siglip_loss(u, v, 9.0, -1.0, z)]
)
def test_the_order_of_the_pairs_does_not_matter(sides, loss):
    u, v = map(torch.tensor, sides)
    positives, order = torch.tensor(DUPLICATES), torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(loss(u[order], v[order], positives[order][:, order]), loss(u, v, positives))


def test_siglip_stays_finite_at_extreme_logits():
    u = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert siglip_loss(u, -u, 100.0, -10.0, torch.eye(2).bool()).isfinite()
