import math
from dataclasses import replace

import numpy as np
import oracles_losses as oracle
import pytest
import torch
from losses_helpers import Batch

from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.losses.objective import Embeddings, LossWeights, Objective, TeacherScale

TEACHER = TeacherScale(scale=20.0, bias=None)
EVERYTHING = LossWeights(
    clip=0.5, siglip=0.25, affinity=2.0, feature_cosine=8.0, feature_mse=100.0, interactive=3.0, temperature=2.0
)
ORDER = ["clip", "siglip", "affinity", "feature_image", "feature_text", "interactive"]


def measure(weights, batch, teacher=TEACHER):
    objective = Objective(weights, teacher).double()
    return objective, objective(*batch.tensors())


def with_unpaired():
    return Batch.random(images=6, texts=5, pairs=4, seed=1)


def test_every_term_and_the_total_match_the_oracles():
    batch = with_unpaired()
    objective, terms = measure(EVERYTHING, batch)
    expected = batch.expected(EVERYTHING, student_scale=10.0, bias=-10.0, teacher_scale=20.0)
    assert list(terms.parts) == ORDER
    for name in ORDER:
        assert terms.parts[name].item() == pytest.approx(expected.parts[name], rel=1e-6), name
        assert not terms.parts[name].requires_grad
    assert terms.total.item() == pytest.approx(expected.total, rel=1e-6)
    assert (objective.scale(), objective.bias()) == (pytest.approx(10.0), -10.0)


def test_the_totals_gradients_match_finite_differences():
    batch = with_unpaired()
    objective = Objective(EVERYTHING, TEACHER).double()
    student, projected, targets = batch.tensors(requires_grad=True)
    objective(student, projected, targets).total.backward()
    scale = math.exp(objective.logit_scale.item())

    def total(**replaced):
        return (
            replace(batch, **replaced).expected(EVERYTHING, student_scale=scale, bias=-10.0, teacher_scale=20.0).total
        )

    for name, tensor in (
        ("u", student.images),
        ("v", student.texts),
        ("pu", projected.images),
        ("pv", projected.texts),
    ):
        numeric = oracle.gradient(lambda array, name=name: total(**{name: array}), getattr(batch, name))
        assert np.abs(numeric).max() > 1e-3
        np.testing.assert_allclose(tensor.grad.numpy(), numeric, rtol=1e-4, atol=1e-6)


def test_the_learned_scales_get_the_gradient_of_their_logarithm():
    batch = with_unpaired()
    objective, terms = measure(EVERYTHING, batch)
    terms.total.backward()
    at = np.array([math.log(10.0), -10.0, math.log(1 / 0.07)])

    def total(point):
        student_scale, bias, icl_scale = math.exp(point[0]), point[1], math.exp(point[2])
        return batch.expected(EVERYTHING, student_scale, bias, 20.0, icl_scale).total

    numeric = oracle.gradient(total, at)
    found = [parameter.grad.item() for parameter in (objective.logit_scale, objective.logit_bias, objective.icl_scale)]
    np.testing.assert_allclose(found, numeric, rtol=1e-4)


def test_only_weighted_terms_are_reported():
    _, terms = measure(LossWeights(clip=1.0, feature_mse=1.0), with_unpaired())
    assert list(terms.parts) == ["clip", "feature_image", "feature_text"]


def test_the_feature_terms_are_reported_as_one_minus_cosine_in_either_form():
    batch = with_unpaired()
    _, cosine = measure(LossWeights(feature_cosine=3.0), batch)
    _, squared = measure(LossWeights(feature_mse=2000.0), batch)
    assert cosine.parts == squared.parts
    for name, u, p in (("feature_image", batch.pu, batch.p), ("feature_text", batch.pv, batch.q)):
        assert cosine.parts[name].item() == pytest.approx(oracle.one_minus_cosine(u, p))
    assert squared.total.item() == pytest.approx(2000 * (oracle.mse(batch.pu, batch.p) + oracle.mse(batch.pv, batch.q)))


@pytest.mark.parametrize(("images", "texts"), [(3, 3), (3, 0), (0, 3)])
def test_without_pairs_the_paired_terms_are_absent_and_nothing_is_nan(images, texts):
    batch = Batch.random(images, texts, pairs=0, seed=2)
    student, projected, targets = batch.tensors(requires_grad=True)
    terms = Objective(EVERYTHING, TEACHER)(student, projected, targets)
    names = ["affinity"] * bool(images and texts) + ["feature_image"] * bool(images) + ["feature_text"] * bool(texts)
    assert list(terms.parts) == names
    expected = batch.expected(EVERYTHING, 10.0, -10.0, 20.0)
    assert terms.total.item() == pytest.approx(expected.total, rel=1e-6)
    terms.total.backward()
    for tensor in (student.images, student.texts, projected.images, projected.texts):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(("images", "texts"), [(2, 2), (0, 0)])
def test_a_batch_with_nothing_to_learn_from_costs_zero_and_can_be_stepped_through(images, texts):
    student, projected, targets = Batch.random(images, texts, pairs=0, seed=2).tensors(requires_grad=True)
    terms = Objective(LossWeights(clip=1.0), TEACHER)(student, projected, targets)
    terms.total.backward()
    assert terms.total.item() == 0
    assert terms.parts == {}
    assert student.images.grad.abs().sum() == 0


def test_one_pair_is_measured():
    batch = Batch.random(1, 1, pairs=1, seed=4)
    _, terms = measure(EVERYTHING, batch)
    assert terms.parts["clip"] == terms.parts["interactive"] == terms.parts["affinity"] == 0
    assert terms.total.item() == pytest.approx(batch.expected(EVERYTHING, 10.0, -10.0, 20.0).total, rel=1e-6)


def test_affinity_rows_pairs_leaves_the_unpaired_rows_out():
    batch = with_unpaired()
    by_rows = {
        rows: measure(LossWeights(affinity=1.0, affinity_rows=rows), batch)[1].total.item() for rows in ("all", "pairs")
    }
    u, v, p, q = (side[:4] for side in (batch.u, batch.v, batch.p, batch.q))
    assert by_rows["pairs"] == pytest.approx(oracle.affinity(u, v, p, q, 1 / 0.07, 20.0), rel=1e-6)
    assert by_rows["all"] != pytest.approx(by_rows["pairs"], rel=1e-3)


def test_multi_positive_off_counts_only_the_own_row():
    batch = with_unpaired()
    weights = LossWeights(clip=1.0, siglip=1.0, interactive=1.0, multi_positive=False)
    _, terms = measure(weights, batch)
    alone = replace(batch, positives=np.eye(4, dtype=bool)).expected(weights, 10.0, -10.0, 20.0)
    assert terms.total.item() == pytest.approx(alone.total, rel=1e-6)
    assert terms.total.item() != pytest.approx(batch.expected(weights, 10.0, -10.0, 20.0).total, rel=1e-3)


def test_the_order_of_pairs_and_of_unpaired_rows_does_not_matter():
    batch = with_unpaired()
    images, texts = [2, 0, 3, 1, 5, 4], [2, 0, 3, 1, 4]
    u, pu, p = (side[images] for side in (batch.u, batch.pu, batch.p))
    v, pv, q = (side[texts] for side in (batch.v, batch.pv, batch.q))
    shuffled = Batch(u, v, pu, pv, p, q, batch.positives[np.ix_(images[:4], images[:4])], pairs=4)
    torch.testing.assert_close(measure(EVERYTHING, shuffled)[1].total, measure(EVERYTHING, batch)[1].total)


@pytest.mark.parametrize(
    ("weights", "teacher", "scale", "bias", "learned"),
    [
        (LossWeights(clip=1), TEACHER, 1 / 0.07, None, {"logit_scale"}),
        (LossWeights(siglip=1), TEACHER, 10.0, -10.0, {"logit_scale", "logit_bias"}),
        (LossWeights(affinity=1), TeacherScale(112.0, -16.0), 1 / 0.07, None, {"logit_scale"}),
        (LossWeights(affinity=1, student_scale=50.0), TEACHER, 50.0, None, set()),
        (LossWeights(siglip=1, student_scale=50.0), TEACHER, 50.0, -10.0, {"logit_bias"}),
        (LossWeights(feature_mse=1), TeacherScale(112.0, -16.0), 112.0, -16.0, set()),
        (LossWeights(interactive=1, student_scale=30.0), TeacherScale(112.0, -16.0), 30.0, None, {"icl_scale"}),
    ],
)
def test_scales_start_as_documented_and_only_those_in_use_are_learned(weights, teacher, scale, bias, learned):
    objective = Objective(weights, teacher)
    assert objective.scale() == pytest.approx(scale, rel=1e-6)
    assert objective.bias() == bias
    assert {name for name, parameter in objective.named_parameters() if parameter.requires_grad} == learned
    assert set(objective.state_dict()) == {"logit_scale", "logit_bias", "icl_scale"}
    assert objective.icl_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_a_fixed_scale_is_the_one_used_and_the_teachers_may_be_replaced():
    batch = with_unpaired()
    _, terms = measure(LossWeights(clip=1, affinity=1, student_scale=50.0, teacher_scale=30.0), batch)
    positives = batch.positives
    assert terms.parts["clip"].item() == pytest.approx(oracle.clip(batch.u[:4], batch.v[:4], 50.0, positives), rel=1e-9)
    whole = oracle.affinity(batch.u, batch.v, batch.p, batch.q, 50.0, 30.0)
    assert terms.parts["affinity"].item() == pytest.approx(whole, rel=1e-9)


def test_learned_scales_are_held_at_100_and_can_come_down_again():
    batch = with_unpaired()
    objective = Objective(LossWeights(clip=1, interactive=1), TEACHER).double()
    with torch.no_grad():
        objective.logit_scale.fill_(9.0)
        objective.icl_scale.fill_(9.0)
    assert objective.scale() == 100.0
    terms = objective(*batch.tensors())
    expected = oracle.clip(batch.u[:4], batch.v[:4], 100.0, batch.positives)
    assert terms.parts["clip"].item() == pytest.approx(expected, rel=1e-9)
    expected = oracle.interactive(batch.pu[:4], batch.pv[:4], batch.p[:4], batch.q[:4], 100.0, batch.positives)
    assert terms.parts["interactive"].item() == pytest.approx(expected, rel=1e-9)
    terms.total.backward()
    assert objective.logit_scale.grad > 0  # random embeddings at scale 100 are far too sure of themselves
    torch.optim.SGD([objective.logit_scale], lr=0.01).step()
    assert objective.scale() < 100


def test_two_batches_may_be_measured_before_one_backward():
    objective = Objective(EVERYTHING, TEACHER)
    (objective(*with_unpaired().tensors()).total + objective(*with_unpaired().tensors()).total).backward()
    assert objective.logit_scale.grad.isfinite()


def test_what_was_learned_travels_in_the_state_dict():
    first, second = Objective(EVERYTHING, TEACHER), Objective(EVERYTHING, TEACHER)
    optimizer = torch.optim.SGD([p for p in first.parameters() if p.requires_grad], lr=0.05)
    first(*with_unpaired().tensors(torch.float32)).total.backward()
    optimizer.step()
    assert first.scale() != second.scale()
    second.load_state_dict(first.state_dict())
    assert (first.scale(), first.bias()) == (second.scale(), second.bias())
    assert torch.equal(*(objective(*with_unpaired().tensors()).total for objective in (first, second)))


def test_half_precision_and_autocast_do_not_reach_the_logits():
    student, projected, targets = with_unpaired().tensors(torch.float32)
    objective = Objective(replace(EVERYTHING, student_scale=100.0), TEACHER)
    exact = objective(student, projected, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = objective(student, projected, targets)
    assert torch.equal(under_autocast.total, exact.total)
    halves = (Embeddings(side.images.half(), side.texts.half()) for side in (student, projected, targets.teacher))
    small, small_projected, small_teacher = halves
    rounded = objective(small, small_projected, replace(targets, teacher=small_teacher))
    assert rounded.total.dtype == torch.float32
    torch.testing.assert_close(rounded.total, exact.total, rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("fault", "field"),
    [
        (lambda b: replace(b, p=b.p[:5]), "images and texts"),
        (lambda b: replace(b, v=b.v[:4], pv=b.pv[:4]), "images and texts"),
        (lambda b: replace(b, pu=b.pu[:, :5]), "projected images"),
        (lambda b: replace(b, pv=b.pv[:1]), "projected texts"),
        (lambda b: replace(b, positives=b.positives[:1]), "positives"),
        (lambda b: replace(b, pairs=6, positives=np.eye(6, dtype=bool)), "number of pairs"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(fault, field):
    with pytest.raises(MismatchError, match=field):
        Objective(EVERYTHING, TEACHER)(*fault(with_unpaired()).tensors())


def test_check_accepts_what_can_be_trained():
    Objective(EVERYTHING, TEACHER).check(has_pairs=False)
    Objective(EVERYTHING, TEACHER).check(has_pairs=False, texts=False)
    Objective(LossWeights(clip=1.0), TEACHER).check(has_pairs=True)
    Objective(LossWeights(affinity=1.0), TEACHER).check(has_pairs=False)
    Objective(LossWeights(feature_mse=1.0, clip=1.0), TEACHER).check(has_pairs=False, images=False)


@pytest.mark.parametrize(
    ("weights", "data", "named"),
    [
        (LossWeights(clip=1.0, interactive=1.0), {}, ["clip", "interactive"]),
        (LossWeights(siglip=1.0), {}, ["siglip"]),
        (LossWeights(affinity=1.0, affinity_rows="pairs"), {}, ["affinity"]),
        (LossWeights(affinity=1.0), {"texts": False}, ["affinity"]),
    ],
)
def test_check_refuses_data_that_no_weighted_loss_can_use(weights, data, named):
    with pytest.raises(ConfigError) as caught:
        Objective(weights, TEACHER).check(has_pairs=False, **data)
    assert [fault.split()[0] for fault in caught.value.faults] == [f"loss.{name}" for name in named]
    assert all('loss.preset = "fd"' in fault for fault in caught.value.faults)


def test_an_objective_without_weights_is_refused():
    with pytest.raises(ConfigError, match="every weight is 0"):
        Objective(LossWeights(), TEACHER)


def test_every_fault_of_the_weights_is_reported_at_once_by_its_path():
    with pytest.raises(ConfigError) as caught:
        LossWeights(
            clip=-1.0,
            siglip=math.nan,
            interactive=math.inf,
            temperature=0.0,
            teacher_scale=-2.0,
            student_scale=math.nan,
            affinity_rows="pair",
            affinity_form="mse",
        )
    paths = [fault.split()[0] for fault in caught.value.faults]
    assert paths == [
        "loss.clip",
        "loss.siglip",
        "loss.interactive",
        "loss.temperature",
        "loss.teacher_scale",
        "loss.student_scale",
        "loss.affinity_rows",
        "loss.affinity_form",
    ]
    assert "'pairs'" in caught.value.faults[6]


@pytest.mark.parametrize(("scale", "bias"), [(0.0, None), (math.nan, None), (-1.0, None), (10.0, math.inf)])
def test_a_teacher_without_a_usable_scale_is_refused(scale, bias):
    with pytest.raises(ConfigError, match="the teacher's logit"):
        TeacherScale(scale, bias)
