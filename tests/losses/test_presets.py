import numpy as np
import oracles_losses as oracle
import pytest
from losses_helpers import Batch

from clipdistill.core.errors import ConfigError
from clipdistill.losses.objective import LossWeights, Objective, TeacherScale
from clipdistill.losses.presets import PRESETS

START, ICL_START, TEACHER_SCALE = 1 / 0.07, 1 / 0.07, 37.0


@pytest.fixture
def batch():
    return Batch.random(images=6, texts=5, pairs=4, seed=21)


def by_hand(batch):
    """Each preset's total, written out from its paper: task, CRD, ICL and FD at their published weights and scales."""
    b, z = batch, batch.positives
    u, v, pu, pv, p, q = (rows[:4] for rows in (b.u, b.v, b.pu, b.pv, b.p, b.q))
    task = oracle.clip(u, v, START, z)
    crd = oracle.affinity(u, v, p, q, START, TEACHER_SCALE)
    icl = oracle.interactive(pu, pv, p, q, ICL_START, z)
    fd = 2000 * oracle.mse(b.pu, b.p) + 2000 * oracle.mse(b.pv, b.q)
    cosines = oracle.one_minus_cosine(b.pu, b.p) + oracle.one_minus_cosine(b.pv, b.q)
    relations = b.relations(ICL_START, teacher_scale=TEACHER_SCALE)
    everything = oracle.affinity(b.u, b.v, b.p, b.q, START, TEACHER_SCALE)
    return {
        "default": 8 * cosines + icl + everything / 2,
        "clip": task,
        "open_clip": task + oracle.affinity(u, v, p, q, START, TEACHER_SCALE, form="cross_entropy"),
        "tinyclip": oracle.affinity(u, v, p, q, 50.0, 50.0, form="cross_entropy"),
        "fd": fd,
        "clip_kd": task + crd + icl + fd,
        "clip_rd": task + crd + icl + fd + relations["vertical"] + relations["cross"],
        "dime_fm": 0.7 * 2 * everything + 0.3 * 2 * relations["pseudo_relation"],
        "mobileclip": oracle.affinity(u, v, p, q, START, 100.0),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_total_is_its_papers_sum(batch, name):
    objective = Objective(PRESETS[name], TeacherScale(TEACHER_SCALE, None)).double()
    assert objective(*batch.tensors()).total.item() == pytest.approx(by_hand(batch)[name], rel=1e-6)


def test_the_presets_are_these():
    assert list(PRESETS) == [
        "default",
        "clip",
        "open_clip",
        "tinyclip",
        "fd",
        "clip_kd",
        "clip_rd",
        "dime_fm",
        "mobileclip",
    ]
    with pytest.raises(TypeError):
        PRESETS["mine"] = LossWeights(clip=1.0)


def test_the_feature_weight_of_default_is_clip_kds_at_width_512():
    assert PRESETS["default"].feature_cosine == pytest.approx(2 * PRESETS["clip_kd"].feature_mse / 512, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_only_presets_with_a_pairless_term_accept_unpaired_data(name):
    objective = Objective(PRESETS[name], TeacherScale(TEACHER_SCALE, None))
    objective.check(has_pairs=True)
    if name in {"default", "fd", "clip_kd", "clip_rd", "dime_fm"}:
        objective.check(has_pairs=False)
    else:
        with pytest.raises(ConfigError, match="needs pictures paired with texts"):
            objective.check(has_pairs=False)


@pytest.mark.parametrize("name", ["default", "fd", "clip_kd", "dime_fm"])
def test_a_copy_of_the_teacher_pays_no_distillation(name):
    generator = np.random.default_rng(8)
    p, q = oracle.unit_rows(generator, 4, 6), oracle.unit_rows(generator, 4, 6)
    batch = Batch(p, q, p, q, p, q, np.eye(4, dtype=bool), 4)
    terms = Objective(PRESETS[name], TeacherScale(START, None)).double()(*batch.tensors())
    for part in {"affinity", "feature_image", "feature_text", "pseudo_relation"} & terms.parts.keys():
        assert terms.parts[part].item() == pytest.approx(0.0, abs=1e-8)
