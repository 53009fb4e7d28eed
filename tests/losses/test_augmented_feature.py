import numpy as np
import oracles_losses as oracle
import pytest
import torch
from losses_helpers import Batch, assert_matches_oracle

from clipdistill.core.errors import ConfigError
from clipdistill.losses.augmented_feature import AugmentedFeature
from clipdistill.losses.batch import Embeddings
from clipdistill.losses.objective import LossWeights, Objective, TeacherScale

POSITIVES = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
TEACHER = TeacherScale(20.0, None)


@pytest.fixture
def rows():
    generator = np.random.default_rng(16)
    return [oracle.unit_rows(generator, 3, dim) for dim in (4, 4, 6, 6)]


def maps(fuse):
    return [
        (side.weight.detach().double().numpy(), side.bias.detach().double().numpy()) for side in (fuse.image, fuse.text)
    ]


def test_value_and_gradients_match_the_oracle(rows):
    u, v, p, q = rows
    fuse = AugmentedFeature(4, 6).double()
    teacher = Embeddings(torch.tensor(p), torch.tensor(q))
    labels = torch.tensor(POSITIVES)
    assert_matches_oracle(
        lambda x, y, s: fuse(Embeddings(x, y), teacher, s, labels),
        lambda x, y, s: oracle.augmented(x, y, p, q, *maps(fuse), float(s), POSITIVES),
        [u, v, np.array(7.0)],
    )


def test_the_maps_learn_and_the_teacher_does_not(rows):
    u, v, p, q = (torch.tensor(side, requires_grad=True) for side in rows)
    fuse = AugmentedFeature(4, 6).double()
    fuse(Embeddings(u, v), Embeddings(p, q), 9.0, torch.tensor(POSITIVES)).backward()
    assert p.grad is None
    assert q.grad is None
    assert all(value.grad.abs().max() > 1e-4 for name, value in fuse.named_parameters() if "weight" in name)


def test_a_narrower_student_is_one_whose_last_columns_are_zero(rows):
    u, v, p, q = (torch.tensor(side, dtype=torch.float32) for side in rows)
    fuse, labels = AugmentedFeature(4, 6), torch.tensor(POSITIVES)
    cut = Embeddings(u[:, :2], v[:, :2])
    whole = Embeddings(*(torch.cat([side[:, :2], torch.zeros(3, 2)], 1) for side in (u, v)))
    assert torch.equal(fuse(cut, Embeddings(p, q), 9.0, labels), fuse(whole, Embeddings(p, q), 9.0, labels))


def test_the_first_maps_depend_on_nothing_ambient():
    torch.manual_seed(1)
    first, after = AugmentedFeature(4, 6), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    second = AugmentedFeature(4, 6)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.image.weight, first.text.weight)


def test_in_an_objective_it_is_named_and_kept_with_the_state():
    batch = Batch.random(images=5, texts=4, pairs=3, seed=3)
    objective = Objective(LossWeights(augmented_feature=2.0, student_scale=9.0), TEACHER, dim=4, teacher_dim=6)
    terms = objective(*batch.tensors(torch.float32))
    sides = [rows[:3] for rows in (batch.u, batch.v, batch.p, batch.q)]
    wanted = oracle.augmented(*sides, *maps(objective.fuse), 9.0, batch.positives)
    assert terms.parts["augmented_feature"].item() == pytest.approx(wanted, rel=1e-5)
    assert terms.total.item() == pytest.approx(2 * wanted, rel=1e-5)
    assert {name for name in objective.state_dict() if name.startswith("fuse")} == {
        f"fuse.{side}.{kind}" for side in ("image", "text") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("widths", [{}, {"dim": 4}, {"teacher_dim": 6}])
def test_without_both_widths_it_is_refused(widths):
    with pytest.raises(ConfigError, match=r"loss\.augmented_feature .* both widths"):
        Objective(LossWeights(augmented_feature=1.0), TEACHER, **widths)
