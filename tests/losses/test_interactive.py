import math

import numpy as np
import oracles_losses as oracle
import pytest
import torch
from losses_helpers import assert_matches_oracle

from clipdistill.losses.contrastive import clip_loss
from clipdistill.losses.interactive import interactive_loss

POSITIVES = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=bool)


@pytest.fixture
def rows():
    generator = np.random.default_rng(11)
    return [oracle.unit_rows(generator, 4, 5) for _ in range(4)]


@pytest.mark.parametrize("positives", [np.eye(4, dtype=bool), POSITIVES], ids=["diagonal", "duplicates"])
def test_value_and_gradients_match_the_oracle(rows, positives):
    u, v, p, q = rows
    assert_matches_oracle(
        lambda x, y, c: interactive_loss(x, y, torch.tensor(p), torch.tensor(q), c, torch.tensor(positives)),
        lambda x, y, c: oracle.interactive(x, y, p, q, float(c), positives),
        [u, v, np.array(14.3)],
    )


def test_a_student_that_equals_the_teacher_has_the_teachers_own_clip_loss(rows):
    p, q = map(torch.tensor, rows[2:])
    positives = torch.tensor(POSITIVES)
    torch.testing.assert_close(interactive_loss(p, q, p, q, 9.0, positives), clip_loss(p, q, 9.0, positives))


def test_equal_embeddings_cost_the_log_of_the_batch_size():
    same = torch.ones(6, 4, dtype=torch.float64) / 2
    loss = interactive_loss(same, same, same, same, 14.3, torch.eye(6).bool())
    assert loss.item() == pytest.approx(math.log(6), abs=1e-12)


def test_no_gradient_reaches_the_teacher_and_the_order_of_pairs_does_not_matter(rows):
    u, v, p, q = (torch.tensor(side, requires_grad=True) for side in rows)
    positives, order = torch.tensor(POSITIVES), torch.tensor([1, 3, 0, 2])
    loss = interactive_loss(u, v, p, q, 9.0, positives)
    loss.backward()
    assert p.grad is None
    assert q.grad is None
    shuffled = interactive_loss(*(side[order] for side in (u, v, p, q)), 9.0, positives[order][:, order])
    torch.testing.assert_close(shuffled, loss)
