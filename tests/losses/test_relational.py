import numpy as np
import oracles_losses as oracle
import pytest
import torch

from clipdistill.losses.relational import cross_loss, vertical_loss

SAME = np.eye(4, dtype=bool)
TWICE = SAME | SAME[[1, 0, 2, 3]]  # rows 0 and 1 are the same text


@pytest.fixture
def rows():
    generator = np.random.default_rng(12)
    return [oracle.unit_rows(generator, 4, 5) for _ in range(4)]


def tensors(rows, *, grad=True):
    return [torch.tensor(side, requires_grad=grad) for side in rows]


def assert_gradients(found, wanted, at):
    for place, tensor in enumerate(found):
        numeric = oracle.gradient(lambda x, place=place: wanted(place, x), at[place])
        assert np.abs(numeric).max() > 1e-3
        np.testing.assert_allclose(tensor.grad.numpy(), numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("same_texts", [SAME, TWICE], ids=["diagonal", "a text twice"])
def test_vertical_matches_the_oracle_and_its_targets_get_no_gradient(rows, same_texts):
    u, v, p, q = rows
    sides = tensors(rows)
    loss = vertical_loss(*sides, 7.0, 9.0, torch.tensor(SAME), torch.tensor(same_texts))
    loss.backward()
    assert loss.item() == pytest.approx(oracle.vertical(u, v, p, q, 7.0, 9.0, SAME, same_texts), rel=1e-10)
    assert sides[2].grad is None
    assert sides[3].grad is None

    def wanted(place, x):
        now = [x if place == own else side for own, side in enumerate((u, v))]
        return oracle.vertical_fixed(*now, p, q, 7.0, 9.0, SAME, same_texts, fixed=v)

    assert_gradients(sides[:2], wanted, (u, v))


def test_cross_matches_the_oracle_and_its_targets_get_no_gradient(rows):
    u, v, p, q = rows
    sides = tensors(rows)
    loss = cross_loss(*sides, 6.0)
    loss.backward()
    assert loss.item() == pytest.approx(oracle.cross(u, v, p, q, 6.0), rel=1e-10)
    assert sides[2].grad is None
    assert sides[3].grad is None
    assert_gradients(
        sides[:2],
        lambda place, x: oracle.cross(*[x if place == own else s for own, s in enumerate((u, v))], p, q, 6.0, (u, v)),
        (u, v),
    )


def test_the_vertical_relation_is_nothing_where_texts_relate_as_pictures_do(rows):
    _, _, p, _ = tensors(rows, grad=False)
    same = torch.tensor(SAME)
    within = sum(
        oracle.matching(oracle.logits_of(rows[2], rows[2], scale), SAME) for scale in (5.0, 5.0)
    )  # what remains: each of the four cross entropies is this one, and they are halved
    assert vertical_loss(p, p, p, p, 5.0, 5.0, same, same).item() == pytest.approx(within, rel=1e-10)


def test_cross_is_zero_for_a_copy_of_a_teacher_without_a_gap_and_not_for_another(rows):
    u, _, p, q = tensors(rows, grad=False)
    assert cross_loss(p, p, p, p, 20.0).item() == pytest.approx(0, abs=1e-12)
    assert cross_loss(p, q, p, q, 20.0).item() > 0.1
    assert cross_loss(u, u, p, p, 20.0).item() == pytest.approx(0, abs=1e-12)  # both relations are equally wrong


def test_one_pair_has_no_relations():
    row = torch.tensor([[0.6, 0.8]])
    same = torch.ones(1, 1, dtype=torch.bool)
    assert vertical_loss(row, -row, row, row, 9.0, 9.0, same, same).item() == 0
    assert cross_loss(row, -row, row, row, 9.0).item() == 0


def test_the_order_of_pairs_does_not_matter(rows):
    sides, order = tensors(rows, grad=False), torch.tensor([2, 0, 3, 1])
    same, twice = torch.tensor(SAME), torch.tensor(TWICE)
    turned = [side[order] for side in sides]
    torch.testing.assert_close(cross_loss(*turned, 6.0), cross_loss(*sides, 6.0))
    torch.testing.assert_close(
        vertical_loss(*turned, 6.0, 4.0, same, twice[order][:, order]), vertical_loss(*sides, 6.0, 4.0, same, twice)
    )
