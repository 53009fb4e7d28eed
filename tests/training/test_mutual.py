from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from training import little, live_teachers

from clipdistill.cache.store import Views
from clipdistill.config import MutualConfig
from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.losses.objective import Embeddings
from clipdistill.towers.live import LiveTeacher
from clipdistill.training.batch import Batch
from clipdistill.training.batches import TrainingData
from clipdistill.training.live import Live
from clipdistill.training.loop import distill
from clipdistill.training.mutual import Mutual

PAIRS = tuple(tiny.pairs(12))
DATA = TrainingData(PAIRS)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def original(request, tmp_path_factory):
    return live_teachers.load(tmp_path_factory.mktemp("teachers") / request.param, request.param)


def bits(module) -> str:
    return fingerprint.of_tensors(module.state_dict())


def run(original, folder=None, *, student=None, until=None, on_eval=None, lines=None, freeze=(), weight=1.0, **train):
    """Student, teacher and objective after a mutual training, which is stopped after a line where that is asked for."""

    def on_log(line):
        if lines is not None:
            lines.append(line)
        if line["step"] == until and "loss" in line:
            raise KeyboardInterrupt

    teacher = original.copy()
    student, objective = student or little.student(drop=0.1), live_teachers.objective(original)
    distill(
        student,
        live_teachers.NoRows(PAIRS),
        DATA,
        objective=objective,
        train=little.settings(**({"accumulation": 2} | train)),
        seed=5,
        folder=folder,
        on_eval=on_eval,
        on_log=on_log,
        live=Live(LiveTeacher(teacher), Views(2, 3)),
        mutual=Mutual(teacher, MutualConfig(lr=1e-3, freeze=freeze, weight=weight)),
    )
    return student, teacher, objective


def test_both_learn_and_the_original_stays(original):
    before, lines = bits(original.model), []
    _, teacher, _ = run(original, lines=lines, steps=40, accumulation=1, batch=12, lr=5e-3)
    assert bits(original.model) == before != bits(teacher.model)
    assert lines[-1]["teacher_task"] < lines[0]["teacher_task"]
    assert lines[-1]["feature_image"] < lines[0]["feature_image"] / 2
    for line in lines:
        assert line["teacher_loss"] == pytest.approx(line["teacher_task"] + line["teacher_kl"], rel=1e-5)
        assert line["lr_teacher"] == pytest.approx(line["lr"] * 1e-3 / 5e-3)
        assert line["teacher_grad_norm"] > 0
    assert not teacher.model.training
    assert not any(value.requires_grad for value in teacher.model.parameters())
    assert teacher.fingerprint != original.fingerprint


def slow_loss(p, q, u, v, positives, scale, bias, student_scale, weight):
    """The teacher's loss row by row in float64, from the formulas."""
    rows, columns = len(p), len(q)
    task = 0.0
    if bias is None:
        for logits, hits in ((scale * p @ q.T, positives), (scale * q @ p.T, positives.T)):
            for row in range(rows):
                logs = logits[row] - np.log(np.exp(logits[row]).sum())
                task -= logs[hits[row]].mean() / rows / 2
    else:
        for row in range(rows):
            for column in range(columns):
                logit = scale * p[row] @ q[column] + bias
                task += np.log1p(np.exp(-logit if positives[row, column] else logit)) / rows
    kl = 0.0
    for theirs, own in ((scale * p @ q.T, student_scale * u @ v.T), (scale * q @ p.T, student_scale * v @ u.T)):
        for row in range(len(theirs)):
            target = np.exp(own[row]) / np.exp(own[row]).sum()
            found = np.exp(theirs[row]) / np.exp(theirs[row]).sum()
            kl += (target * np.log(target / found)).sum() / len(theirs) / 2
    return task, kl, task + weight * kl


def test_its_loss_is_its_task_and_the_divergence_from_the_student(original):
    draw = np.random.default_rng(0)
    p, q, u, v = (row / np.linalg.norm(row, axis=1, keepdims=True) for row in draw.standard_normal((4, 5, 24)))
    positives = np.eye(5, dtype=bool)
    positives[0, 3] = positives[3, 0] = True
    mutual = Mutual(original.copy(), MutualConfig(weight=0.7))
    teacher = Embeddings(torch.tensor(p, requires_grad=True), torch.tensor(q, requires_grad=True))
    student = Embeddings(torch.tensor(u, requires_grad=True), torch.tensor(v, requires_grad=True))
    none = torch.zeros(0)
    batch = Batch(0, none, none, none, none, torch.tensor(positives), 5, ("",) * 5, ("",) * 5, ())
    terms = mutual.losses(teacher, student, 20.0, batch)
    expected = slow_loss(p, q, u, v, positives, original.scale, original.bias, 20.0, 0.7)
    found = [terms.parts[name].item() for name in ("teacher_task", "teacher_kl", "teacher_loss")]
    assert found == pytest.approx(expected, rel=1e-5)
    terms.total.backward()
    assert teacher.images.grad.abs().sum() > 0
    assert student.images.grad is None and student.texts.grad is None


def test_the_students_gradients_are_those_of_live_training(original):
    """At the first step, where the teacher is the same and does not drop out; the teacher's own loss must not leak."""
    found = []
    for trained in (False, True):
        student, teacher, gradients = little.student("test_vit"), original.copy(), {}

        def step(self, *arguments, student=student, gradients=gradients):
            named = student.model.named_parameters()
            gradients.update({name: value.grad.clone() for name, value in named if value.grad is not None})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            distill(
                student,
                live_teachers.NoRows(PAIRS),
                DATA,
                objective=live_teachers.objective(original),
                train=little.settings(steps=1),
                seed=5,
                live=Live(LiveTeacher(teacher), Views(1)),
                mutual=Mutual(teacher, MutualConfig(weight=3.0)) if trained else None,
            )
        found.append(gradients)
    assert len(found[0]) > 30
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-5)


def test_frozen_parts_stand_still_and_unknown_ones_are_refused(original):
    before = {name: value.clone() for name, value in original.model.state_dict().items()}
    _, teacher, _ = run(original, freeze=("visual", "text.transformer"), steps=3)
    moved = [name for name, value in teacher.model.state_dict().items() if not torch.equal(value, before[name])]
    assert "text.text_projection.weight" in moved or "text.text_projection" in moved
    assert not any(name.startswith(("visual", "text.transformer")) for name in moved)
    with pytest.raises(ConfigError, match=r"mutual\.freeze: no parameter begins with 'visaul'; did you mean 'visual'"):
        run(original, freeze=("visaul",))
    with pytest.raises(ConfigError, match=r"mutual\.freeze: nothing of the teacher is left to train"):
        run(original, freeze=("visual", "text"))


def test_the_teacher_of_the_best_students_step_is_kept(original):
    scores, seen, copies = {3: 0.5, 6: 0.2, 8: 0.1}, {}, []

    class Spied:
        def __getattr__(self, name):
            return getattr(original, name)

        def copy(self):
            copies.append(original.copy())
            return copies[0]

    def on_eval(student, step):
        seen[step] = bits(copies[0].model)
        return {"score": scores[step]}

    _, teacher, _ = run(Spied(), on_eval=on_eval)
    assert len(set(seen.values())) == 3
    assert bits(teacher.model) == seen[3]


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit_with_its_teacher(original, tmp_path):
    def on_eval(student, step):
        return {"score": {3: 0.2, 6: 0.1, 8: 0.1}[step]}  # the best lies before the stop

    whole = run(original, on_eval=on_eval)
    with pytest.raises(KeyboardInterrupt):
        run(original, tmp_path, on_eval=on_eval, until=5)
    again = run(original, tmp_path, on_eval=on_eval)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 3
    (student, teacher, objective), (their_student, their_teacher, their_objective) = whole, again
    assert bits(student.module) == bits(their_student.module)
    assert bits(teacher.model) == bits(their_teacher.model)
    assert bits(objective) == bits(their_objective)


def test_a_teacher_that_is_not_finite_skips_the_step_for_both(original):
    broken = original.copy()
    with torch.no_grad():
        broken.model.text.positional_embedding[0] = float("nan")
    student, lines = little.student(), []
    before = student.fingerprint
    with pytest.raises(DataError, match=r"the teacher's nan and nan.*train\.max_skipped = 1"):
        run(broken, student=student, lines=lines, max_skipped=1)
    assert student.fingerprint == before
    assert [line["skipped"] for line in lines] == [1]
