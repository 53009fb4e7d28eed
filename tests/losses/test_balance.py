import math

import pytest
import torch
from losses_helpers import Batch

from clipdistill.core import curves
from clipdistill.core.errors import ConfigError
from clipdistill.losses.batch import ExtraTerm
from clipdistill.losses.objective import LossWeights, Objective, TeacherScale

TEACHER = TeacherScale(20.0, None)
RAMP = ((0.25, 0.0), (0.75, 2.0))


def batch():
    return Batch.random(images=6, texts=5, pairs=4, seed=1).tensors()


@pytest.mark.parametrize(
    ("share", "factor"), [(0.0, 0.0), (0.25, 0.0), (0.375, 0.5), (0.5, 1.0), (0.75, 2.0), (1.0, 2.0)]
)
def test_a_scheduled_weight_follows_its_points_and_the_others_stay(share, factor):
    weights = LossWeights(clip=3.0, feature_cosine=8.0, schedule={"clip": RAMP})
    terms = Objective(weights, TEACHER)(*batch(), share=share)
    plain = Objective(LossWeights(clip=3.0, feature_cosine=8.0), TEACHER)(*batch())
    features = 8 * (plain.parts["feature_image"] + plain.parts["feature_text"])
    assert terms.total.item() == pytest.approx((3 * factor * plain.parts["clip"] + features).item(), rel=1e-6)
    assert ("clip" in terms.parts) == (factor > 0)
    assert weights.at(share) == {
        name: value for name, value in (("clip", 3 * factor), ("feature_cosine", 8.0)) if value
    }


def test_one_point_is_a_constant():
    assert [curves.value_at([(0.5, 0.3)], share) for share in (0.0, 0.5, 1.0)] == [0.3, 0.3, 0.3]


def test_both_feature_weights_may_be_scheduled_apart():
    weights = LossWeights(feature_cosine=1.0, feature_mse=100.0, schedule={"feature_mse": ((0.0, 0.0), (1.0, 1.0))})
    first, last = (Objective(weights, TEACHER)(*batch(), share=share) for share in (0.0, 1.0))
    assert list(first.parts) == list(last.parts) == ["feature_image", "feature_text"]
    cosines = sum(first.parts.values())
    assert first.total.item() == pytest.approx(cosines.item(), rel=1e-6)
    assert last.total.item() == pytest.approx((cosines * (1 + 100 * 2 / 6)).item(), rel=1e-6)


def test_further_terms_are_neither_scheduled_nor_balanced():
    weights = LossWeights(clip=1.0, schedule={"clip": ((0.0, 0.0), (1.0, 1.0))}, balance="uncertainty")
    extra = [ExtraTerm("blocks", 3.0, torch.tensor(2.0, requires_grad=True))]
    terms = Objective(weights, TEACHER)(*batch(), extra=extra, share=0.0)
    assert terms.total.item() == 6.0
    assert terms.parts["blocks"] == 2.0


@pytest.mark.parametrize(
    ("schedule", "fault"),
    [
        ({"clop": RAMP}, r"loss\.schedule\.clop: there is no such weight; did you mean 'clip'\?"),
        ({"affinity": RAMP}, r"loss\.schedule\.affinity: loss\.affinity is 0"),
        ({"clip": ()}, r"loss\.schedule\.clip: has no points"),
        ({"clip": ((0.5, 1.0), (0.5, 2.0))}, "shares rise from point to point; got 0.5 and then 0.5"),
        ({"clip": ((0.5, 1.0), (0.2, 2.0))}, "shares rise"),
        ({"clip": ((0.0, 1.0), (1.5, 2.0))}, "between 0 and 1; got 1.5"),
        ({"clip": ((0.0, -1.0),)}, "factors are finite numbers, 0 or more; got -1.0"),
        ({"clip": ((0.0, math.inf),)}, "got inf"),
        ({"clip": ((math.nan, 1.0),)}, "between 0 and 1; got nan"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(schedule, fault):
    with pytest.raises(ConfigError, match=fault):
        LossWeights(clip=1.0, schedule=schedule)


def test_balancing_starts_as_the_fixed_sum():
    given = {"clip": 1.0, "affinity": 2.0, "feature_cosine": 8.0}
    fixed = Objective(LossWeights(**given), TEACHER)(*batch())
    balanced = Objective(LossWeights(**given, balance="uncertainty"), TEACHER)(*batch())
    assert balanced.total.item() == pytest.approx(fixed.total.item(), rel=1e-12)
    assert {name: value.item() for name, value in balanced.parts.items() if name.startswith("log_variance")} == {
        f"log_variance_{name}": 0.0 for name in given
    }


def test_at_the_best_log_variances_the_derivative_is_zero_and_each_term_is_weighed_by_its_size():
    weights = LossWeights(clip=1.0, affinity=2.0, feature_cosine=8.0, balance="uncertainty")
    objective = Objective(weights, TEACHER).double()
    parts = objective(*batch()).parts
    losses = {
        "clip": parts["clip"],
        "affinity": parts["affinity"],
        "feature_cosine": (parts["feature_image"] + parts["feature_text"]) / 2,  # one log-variance for both modalities
    }
    with torch.no_grad():
        for name, loss in losses.items():
            objective.uncertainty.log_variances[name].copy_(loss.log())
    terms = objective(*batch())
    terms.total.backward()
    for name, value in objective.uncertainty.log_variances.items():
        assert value.grad.item() == pytest.approx(0, abs=1e-9), name
    counts = {"clip": 1.0, "affinity": 2.0, "feature_cosine": 16.0}
    assert terms.total.item() == pytest.approx(
        sum(count * (1 + math.log(losses[name])) for name, count in counts.items()), rel=1e-9
    )


def test_the_log_variance_gets_the_gradient_of_its_formula():
    objective = Objective(LossWeights(clip=3.0, balance="uncertainty"), TEACHER).double()
    with torch.no_grad():
        objective.uncertainty.log_variances["clip"].fill_(0.7)
    terms = objective(*batch())
    terms.total.backward()
    loss = terms.parts["clip"].item()
    assert terms.total.item() == pytest.approx(3 * (math.exp(-0.7) * loss + 0.7), rel=1e-6)
    found = objective.uncertainty.log_variances["clip"].grad.item()
    assert found == pytest.approx(3 * (1 - math.exp(-0.7) * loss), rel=1e-6)
    assert terms.parts["log_variance_clip"].item() == pytest.approx(0.7)


def test_log_variances_are_held_within_bounds():
    objective = Objective(LossWeights(clip=1.0, affinity=1.0, balance="uncertainty"), TEACHER)
    with torch.no_grad():
        objective.uncertainty.log_variances["clip"].fill_(-80.0)
        objective.uncertainty.log_variances["affinity"].fill_(80.0)
    assert objective(*batch()).total.isfinite()
    held = objective.uncertainty.log_variances
    assert (held["clip"].item(), held["affinity"].item()) == (-10.0, 10.0)


def test_a_term_without_rows_does_not_move_its_log_variance():
    objective = Objective(LossWeights(clip=1.0, feature_cosine=1.0, balance="uncertainty"), TEACHER)
    student, projected, targets = Batch.random(images=3, texts=3, pairs=0, seed=2).tensors(requires_grad=True)
    objective(student, projected, targets).total.backward()
    assert objective.uncertainty.log_variances["clip"].grad is None
    assert objective.uncertainty.log_variances["feature_cosine"].grad is not None
