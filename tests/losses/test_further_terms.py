"""The objective with the terms beyond the first six, its widths, its queue, its masked pictures and its members."""

import math
from dataclasses import replace

import numpy as np
import oracles_losses as oracle
import pytest
import torch
from losses_helpers import Batch

from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.losses.batch import ExtraTerm
from clipdistill.losses.objective import Embeddings, LossWeights, Member, Objective, TeacherScale

TEACHER = TeacherScale(20.0, None)
START = 1 / 0.07
FURTHER = LossWeights(
    interactive=1.0,
    vertical=0.5,
    cross=2.0,
    gradient=100.0,
    pseudo_relation=3.0,
    queue=4.0,
    masked_feature=5.0,
    student_scale=START,
)
ORDER = ["interactive", "vertical", "cross", "gradient", "pseudo_relation", "queue", "masked_feature"]
MEMBERS = [(slice(0, 2), 9.0, 1.0), (slice(2, 6), 30.0, 2.0)]


@pytest.fixture
def batch():
    return Batch.random(images=6, texts=5, pairs=4, seed=31)


def stored(images=7, texts=9):
    generator = np.random.default_rng(32)
    return oracle.unit_rows(generator, images, 6), oracle.unit_rows(generator, texts, 6)


def masked_rows(count=6):
    return oracle.unit_rows(np.random.default_rng(33), count, 6)


def with_queue(targets, images, texts):
    return replace(targets, queue=Embeddings(torch.tensor(images), torch.tensor(texts)))


def queued(batch, images, texts, scale=20.0):
    sides = ((batch.pu, batch.p, texts), (batch.pv, batch.q, images))
    return sum(oracle.among(*each, scale, 1.0) for each in sides if all(len(side) for side in each)) / 2


def test_every_further_term_and_the_total_match_the_oracles(batch):
    student, projected, targets = batch.tensors()
    objective = Objective(FURTHER, TEACHER).double()
    terms = objective(student, projected, with_queue(targets, *stored()), masked=torch.tensor(masked_rows()))
    expected = batch.relations(START) | {
        "queue": queued(batch, *stored()),
        "masked_feature": oracle.one_minus_cosine(masked_rows(), batch.p),
        "interactive": batch.expected(FURTHER, START, -10.0, 20.0).parts["interactive"],
    }
    assert list(terms.parts) == ORDER
    for name in ORDER:
        assert terms.parts[name].item() == pytest.approx(expected[name], rel=1e-6), name
        assert not terms.parts[name].requires_grad
    assert terms.total.item() == pytest.approx(sum(getattr(FURTHER, name) * expected[name] for name in ORDER), rel=1e-6)


def test_gradients_reach_the_projected_rows_the_scales_and_the_masked_rows_alone(batch):
    student, projected, targets = batch.tensors(requires_grad=True)
    queue = Embeddings(*(torch.tensor(side, requires_grad=True) for side in stored()))
    masked = torch.tensor(masked_rows(), requires_grad=True)
    objective = Objective(FURTHER, TEACHER)
    objective(student, projected, replace(targets, queue=queue), masked=masked).total.backward()
    for side in (projected.images, projected.texts, masked):
        assert (side.grad.abs().sum(dim=1) > 0).all()
    for side in (student.images, student.texts):
        assert side.grad.abs().max() == 0
    for side in (targets.teacher.images, targets.teacher.texts, queue.images, queue.texts):
        assert side.grad is None
    learned = {name for name, value in objective.named_parameters() if value.requires_grad}
    assert learned == {"icl_scale", "vertical_scales"}
    assert objective.vertical_scales.grad.abs().min() > 0


def test_half_precision_rows_are_measured_in_full(batch):
    student, projected, targets = batch.tensors(torch.float32)
    masked = torch.tensor(masked_rows(), dtype=torch.float32)
    targets = with_queue(targets, *(side.astype(np.float32) for side in stored()))
    objective = Objective(FURTHER, TEACHER)
    exact = objective(student, projected, targets, masked=masked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objective(student, projected, targets, masked=masked).total, exact.total)
    halves = [Embeddings(side.images.half(), side.texts.half()) for side in (student, projected)]
    rounded = objective(*halves, targets, masked=masked.half())
    assert rounded.total.dtype == torch.float32
    torch.testing.assert_close(rounded.total, exact.total, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("images", "texts"), [(3, 3), (3, 0), (0, 3), (1, 0)])
def test_without_pairs_only_the_unpaired_terms_are_there(images, texts):
    batch = Batch.random(images, texts, pairs=0, seed=34)
    student, projected, targets = batch.tensors(requires_grad=True)
    masked = torch.tensor(masked_rows(images)).reshape(images, 6)
    terms = Objective(FURTHER, TEACHER)(student, projected, with_queue(targets, *stored()), masked=masked)
    assert list(terms.parts) == ["pseudo_relation", "queue", *(["masked_feature"] if images else [])]
    assert terms.parts["queue"].item() == pytest.approx(queued(batch, *stored()), rel=1e-6)
    terms.total.backward()
    for side in (student.images, student.texts, projected.images, projected.texts):
        assert side.grad.isfinite().all()


def test_a_queue_of_one_modality_serves_the_other(batch):
    student, projected, targets = batch.tensors()
    images, texts = stored(0, 9)
    terms = Objective(LossWeights(queue=1.0), TEACHER)(student, projected, with_queue(targets, images, texts))
    assert terms.parts["queue"].item() == pytest.approx(oracle.among(batch.pu, batch.p, texts, 20.0, 1.0) / 2, rel=1e-6)


def test_without_a_queue_or_masked_pictures_their_terms_are_absent(batch):
    terms = Objective(FURTHER, TEACHER)(*batch.tensors())
    assert list(terms.parts) == ORDER[:-2]


def test_the_teachers_scale_may_be_replaced_in_every_loss_of_distributions(batch):
    student, projected, targets = batch.tensors()
    weights = LossWeights(queue=1.0, pseudo_relation=1.0, teacher_scale=11.0, temperature=2.0)
    terms = Objective(weights, TEACHER)(student, projected, with_queue(targets, *stored()))
    sides = ((batch.pu, batch.p, stored()[1]), (batch.pv, batch.q, stored()[0]))
    assert terms.parts["queue"].item() == pytest.approx(sum(oracle.among(*s, 11.0, 2.0) for s in sides) / 2, rel=1e-6)
    wanted = batch.relations(START, teacher_scale=11.0)["pseudo_relation"]
    assert terms.parts["pseudo_relation"].item() == pytest.approx(wanted, rel=1e-6)


def test_equal_rows_of_the_teacher_are_positives_of_each_other_in_the_vertical_loss(batch):
    batch.q[1], batch.v[1] = batch.q[0], batch.v[0]
    same = np.eye(4, dtype=bool)
    twice = same | same[[1, 0, 2, 3]]
    sides = [rows[:4] for rows in (batch.pu, batch.pv, batch.p, batch.q)]
    for multi_positive, texts in ((True, twice), (False, same)):
        objective = Objective(LossWeights(vertical=1.0, multi_positive=multi_positive), TEACHER).double()
        wanted = oracle.vertical(*sides, START, START, same, texts)
        assert objective(*batch.tensors()).total.item() == pytest.approx(wanted, rel=1e-6)


def test_the_cross_loss_alone_does_not_learn_a_scale():
    objective = Objective(LossWeights(cross=1.0), TEACHER)
    assert not any(value.requires_grad for value in objective.parameters())
    assert Objective(LossWeights(cross=1.0, interactive=1.0), TEACHER).icl_scale.requires_grad


def test_the_vertical_scales_are_held_at_100(batch):
    objective = Objective(LossWeights(vertical=1.0), TEACHER)
    with torch.no_grad():
        objective.vertical_scales.fill_(9.0)
    objective(*batch.tensors())
    assert objective.vertical_scales.detach().exp().tolist() == pytest.approx([100.0, 100.0])


EVERYWHERE = LossWeights(clip=1.0, affinity=2.0, feature_cosine=8.0, interactive=1.0, queue=1.0, masked_feature=1.0)


def narrow(batch, width, seed):
    """The same batch with the student's rows cut to a width, and some other rows for their projection."""
    generator = np.random.default_rng(seed)
    cut = [oracle.unit(rows[:, :width]) for rows in (batch.u, batch.v)]
    return replace(
        batch, u=cut[0], v=cut[1], pu=oracle.unit_rows(generator, 6, 6), pv=oracle.unit_rows(generator, 5, 6)
    )


def test_narrower_widths_are_averaged_with_the_full_one_and_named(batch):
    thin, thinner = narrow(batch, 3, 41), narrow(batch, 2, 42)
    weights = replace(EVERYWHERE, masked_feature=0.0)
    objective = Objective(weights, TEACHER).double()
    student, projected, targets = batch.tensors()
    targets = with_queue(targets, *stored())
    narrower = [each.tensors()[:2] for each in (thin, thinner)]
    terms = objective(student, projected, targets, narrower=narrower)
    alone = [objective(*each.tensors()[:2], targets) for each in (batch, thin, thinner)]
    assert terms.total.item() == pytest.approx(sum(each.total.item() for each in alone) / 3, rel=1e-9)
    assert terms.parts == alone[0].parts | {
        f"{name}@{width}": value for width, each in ((3, alone[1]), (2, alone[2])) for name, value in each.parts.items()
    }
    assert "feature_image@2" in terms.parts


def test_masked_and_further_terms_count_once_whatever_the_widths(batch):
    thin = narrow(batch, 2, 43).tensors()[:2]
    extra = [ExtraTerm("blocks", 3.0, torch.tensor(2.0))]
    objective = Objective(LossWeights(clip=1.0, masked_feature=5.0), TEACHER)
    plain, whole = (
        objective(*batch.tensors(), narrower=[thin], **given)
        for given in ({}, {"masked": torch.tensor(masked_rows()), "extra": extra})
    )
    wanted = 5 * oracle.one_minus_cosine(masked_rows(), batch.p) + 6
    assert whole.total.item() - plain.total.item() == pytest.approx(wanted, rel=1e-6)
    assert "masked_feature@2" not in whole.parts


def test_every_width_is_trained(batch):
    student, projected, targets = batch.tensors(requires_grad=True)
    thin = narrow(batch, 2, 44).tensors(requires_grad=True)[:2]
    Objective(EVERYWHERE, TEACHER)(student, projected, targets, narrower=[thin]).total.backward()
    for side in (student, projected, *thin):
        assert side.images.grad.abs().max() > 0
        assert side.texts.grad.abs().max() > 0


def test_a_narrower_width_of_other_rows_is_refused(batch):
    thin = Batch.random(images=6, texts=4, pairs=4, seed=1).tensors()[:2]
    with pytest.raises(MismatchError, match="images and texts"):
        Objective(EVERYWHERE, TEACHER)(*batch.tensors(), narrower=[thin])


def mixed_affinity(batch, student_scale, temperature, form="kl"):
    total = 0.0
    for left, right, p, q in ((batch.u, batch.v, batch.p, batch.q), (batch.v, batch.u, batch.q, batch.p)):
        target = oracle.mixture(p, q, MEMBERS, temperature)
        rows = oracle.logits_of(left, right, student_scale / temperature)
        for probabilities, row in zip(target, rows, strict=True):
            for t, s in zip(probabilities, oracle.softmax_row(row), strict=True):
                total += (t * math.log(t / s) if form == "kl" else -t * math.log(s)) / len(left)
    return temperature**2 * total / 2


@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_members_probabilities_are_averaged(batch, temperature, form):
    teacher = TeacherScale(20.0, None, tuple(Member(*each) for each in MEMBERS))
    weights = LossWeights(affinity=1.0, student_scale=8.0, temperature=temperature, affinity_form=form)
    total = Objective(weights, teacher)(*batch.tensors()).total
    assert total.item() == pytest.approx(mixed_affinity(batch, 8.0, temperature, form), rel=1e-6)


def test_the_mixtures_gradient_is_the_mean_of_the_members_gradients(batch):
    """MobileCLIP averages the members' divergences; the mixture differs by a constant, so the gradients are equal."""
    weights = LossWeights(affinity=1.0, student_scale=8.0)

    def gradient(teacher, p, q):
        student, projected, targets = batch.tensors(requires_grad=True)
        targets = replace(targets, teacher=Embeddings(torch.tensor(p), torch.tensor(q)))
        projected = targets.teacher
        Objective(weights, teacher)(student, projected, targets).total.backward()
        return student.images.grad

    mixed = gradient(TeacherScale(20.0, None, tuple(Member(*each) for each in MEMBERS)), batch.p, batch.q)
    alone = [
        share * gradient(TeacherScale(scale, None), *(oracle.unit(side[:, columns]) for side in (batch.p, batch.q)))
        for (columns, scale, _), share in zip(MEMBERS, (1 / 3, 2 / 3), strict=True)
    ]
    torch.testing.assert_close(mixed, alone[0] + alone[1], rtol=1e-9, atol=1e-12)


def test_one_member_of_all_columns_is_the_plain_teacher(batch):
    weights = LossWeights(affinity=1.0)
    plain = Objective(weights, TEACHER)(*batch.tensors()).total
    member = TeacherScale(99.0, None, (Member(slice(0, 6), 20.0, 7.0),))
    torch.testing.assert_close(Objective(weights, member)(*batch.tensors()).total, plain)


def test_a_stated_teacher_scale_is_every_members(batch):
    scaled = [(columns, 13.0, weight) for columns, _, weight in MEMBERS]
    totals = [
        Objective(LossWeights(affinity=1.0, teacher_scale=given), teacher)(*batch.tensors()).total
        for given, teacher in (
            (13.0, TeacherScale(20.0, None, tuple(Member(*each) for each in MEMBERS))),
            (None, TeacherScale(20.0, None, tuple(Member(*each) for each in scaled))),
        )
    ]
    assert totals[0] == totals[1]


@pytest.mark.parametrize(
    ("member", "fault"),
    [
        (Member(slice(0, 2), 0.0, 1.0), "scale"),
        (Member(slice(0, 2), 9.0, math.nan), "weight"),
        (Member(slice(2, 2), 9.0, 1.0), "columns"),
        (Member(slice(None), 9.0, 1.0), "columns"),
    ],
)
def test_a_member_that_cannot_speak_is_refused(member, fault):
    with pytest.raises(ConfigError, match=f"a teacher's {fault} must"):
        TeacherScale(20.0, None, (member,))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"masked": torch.zeros(5, 6)}, "masked images"),
        ({"queue": Embeddings(torch.zeros(3, 6), torch.zeros(3, 5))}, "widths of the queue"),
        ({"members": (Member(slice(0, 7), 9.0, 1.0),)}, "columns of the teacher's members"),
    ],
)
def test_what_does_not_belong_to_the_teacher_is_refused(batch, change, field):
    student, projected, targets = batch.tensors()
    objective = Objective(FURTHER, replace(TEACHER, members=change.get("members", ())))
    with pytest.raises(MismatchError, match=field):
        objective(student, projected, replace(targets, queue=change.get("queue")), masked=change.get("masked"))


@pytest.mark.parametrize("name", ["vertical", "cross", "gradient", "augmented_feature"])
def test_terms_of_pairs_need_pairs(name):
    objective = Objective(LossWeights(**{name: 1.0}), TEACHER, dim=4, teacher_dim=6)
    objective.check(has_pairs=True)
    with pytest.raises(ConfigError, match=rf"loss\.{name} needs pictures paired with texts"):
        objective.check(has_pairs=False)


def test_terms_of_single_modalities_do_not():
    for name in ("pseudo_relation", "queue"):
        Objective(LossWeights(**{name: 1.0}), TEACHER).check(has_pairs=False, images=False)
    masked = Objective(LossWeights(masked_feature=1.0), TEACHER)
    masked.check(has_pairs=False, texts=False)
    with pytest.raises(ConfigError, match=r"loss\.masked_feature needs pictures"):
        masked.check(has_pairs=False, images=False)


def test_the_masked_pictures_are_asked_for_while_their_weight_is_above_zero():
    scheduled = LossWeights(
        clip=1.0, masked_feature=1.0, schedule={"masked_feature": ((0.0, 0.0), (0.5, 0.0), (1.0, 1.0))}
    )
    assert [Objective(scheduled, TEACHER).wants_masked(share) for share in (0.0, 0.5, 0.6)] == [False, False, True]
    assert not Objective(LossWeights(clip=1.0), TEACHER).wants_masked(0.6)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"mask_ratio": 0.0}, r"loss\.mask_ratio"),
        ({"mask_ratio": 1.0}, r"loss\.mask_ratio"),
        ({"mask_ratio": math.nan}, r"loss\.mask_ratio"),
        ({"queue": 1.0, "queue_rows": 1}, r"loss\.queue_rows must be 2 or more"),
        ({"balance": "uncertain"}, r"loss\.balance = 'uncertain' is unknown; did you mean 'uncertainty'\?"),
        ({"vertical": -1.0}, r"loss\.vertical must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(given, fault):
    with pytest.raises(ConfigError, match=fault):
        LossWeights(**{"clip": 1.0} | given)
