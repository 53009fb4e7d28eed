from __future__ import annotations

import json
import logging
import time

import pytest
import tiny
from training import little

from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.training import loop
from clipdistill.training.batches import TrainingData
from clipdistill.training.budget import Cost, measure, plan_steps
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(12))


def run(folder=None, *, until=None, scores=None, **train):
    def on_log(line):
        if line["step"] == until:
            raise KeyboardInterrupt

    def on_eval(student, step):
        if scores is not None:
            scores.append(step)
        return {"score": float(step)}

    student, objective = little.student(drop=0.2), little.objective()
    distill(
        student,
        little.Teacher(PAIRS, 2),
        TrainingData(PAIRS),
        objective=objective,
        train=little.settings(**({"ema": 0.5, "accumulation": 2} | train)),
        seed=5,
        folder=folder,
        on_eval=on_eval,
        fingerprint="run",
        on_log=on_log,
    )
    return fingerprint.of_tensors({**student.module.state_dict(), **objective.state_dict()})


@pytest.fixture
def measured(monkeypatch):
    """The measurement is made, and says half a second a step, one an evaluation, one in all: 6 s are 8 steps."""
    calls = []

    def pretended(batches, step, evaluate, seconds):
        calls.append(measure(batches, step, evaluate, seconds))
        return Cost(0.5, 1.0, 1.0)

    monkeypatch.setattr(loop, "measure", pretended)
    return calls


@pytest.mark.parametrize(
    ("minutes", "cost", "steps", "evaluations", "warmup"),
    [
        (10, Cost(0.5, 10.0, 20.0), 1060, 5, 53),  # 580 s: five evaluations, as many as configured, and 530 s of steps
        (10, Cost(0.5, 100.0, 0.0), 1000, 1, 50),  # the evaluations may take a quarter of it
        (1, Cost(50.0, 5.0, 0.0), 1, 1, 0),
        (60, Cost(0.001, 0.0, 0.0), 3_600_000, 5, 180_000),
    ],
)
def test_the_plan_fits_the_budget_and_keeps_the_proportions(minutes, cost, steps, evaluations, warmup):
    train = little.settings(budget_minutes=minutes, steps=1000, warmup=50, eval_every=200, save_every=100)
    plan = plan_steps(train, cost)
    assert (plan.steps, -(-plan.steps // plan.eval_every), plan.warmup) == (steps, evaluations, warmup)
    assert plan.planned_seconds <= minutes * 60
    assert plan.planned_seconds + cost.step_seconds + cost.evaluation_seconds * 4 > minutes * 60
    assert plan.save_every == max(1, round(steps / 10))
    settings = plan.settings(train)
    assert (settings.steps, settings.batch, settings.lr) == (plan.steps, train.batch, train.lr)


def test_a_budget_for_less_than_a_step_and_an_evaluation_is_refused_with_both_times():
    message = (
        r"train\.budget_minutes: 0\.05 \(3\.0 s\).*one step takes 2\.50 s and one evaluation 1\.00 s; give at least"
    )
    with pytest.raises(ConfigError, match=message):
        plan_steps(little.settings(budget_minutes=0.05), Cost(2.5, 1.0, 0.2))


def test_a_measurement_leaves_out_the_warm_up():
    taken = []

    def step(batch):
        taken.append(batch)
        time.sleep(0.3 if len(taken) == 1 else 0.02)

    cost = measure(iter(range(6)), step, lambda: time.sleep(0.1), 600.0)
    assert taken == list(range(6))
    assert 0.02 <= cost.step_seconds < 0.1
    assert 0.1 <= cost.evaluation_seconds < 0.3
    assert cost.spent_seconds >= 0.5
    short = []
    measure(iter(range(6)), lambda batch: short.append(batch) or time.sleep(0.02), lambda: None, 0.01)
    assert short == [0, 1]


def test_a_planned_run_has_the_bits_of_one_with_those_steps_and_tells_the_time(measured, tmp_path, caplog):
    steps = []
    with caplog.at_level(logging.INFO, "clipdistill"):
        found = run(tmp_path, budget_minutes=0.1, steps=80, eval_every=40, warmup=20, scores=steps)
    assert steps == [0, 8]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["steps"], plan["eval_every"], plan["warmup"], plan["save_every"]) == (8, 8, 2, 1)
    assert plan["planned_seconds"] == 6.0
    assert plan["taken_seconds"] > 1.0
    assert measured[0].step_seconds > 0
    assert (
        "6 s are enough for 8 x 0.5 s of training and 1 x 1 s of evaluation (warmup 2, eval_every 8); planned: 6 s"
        in caplog.text
    )
    assert "planned: 6 s, taken: " in caplog.text
    assert found == run(steps=8, eval_every=8, warmup=2, save_every=1)
    assert not list(tmp_path.glob(".partial-*"))


def test_a_resumed_run_keeps_its_plan_and_another_run_is_refused_it(measured, tmp_path, monkeypatch):
    whole = run(budget_minutes=0.1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, budget_minutes=0.1, until=5)
    before = json.loads((tmp_path / "plan.json").read_text())
    monkeypatch.setattr(loop, "measure", lambda *rest: pytest.fail("measured anew"))
    assert run(tmp_path, budget_minutes=0.1) == whole
    after = json.loads((tmp_path / "plan.json").read_text())
    assert after.pop("taken_seconds") > before.pop("taken_seconds")
    assert after == before
    (tmp_path / "plan.json").write_text(json.dumps(after | {"fingerprint": "another"}))
    with pytest.raises(MismatchError, match=r"plan\.json: fingerprint|plan\.json does not match|fingerprint"):
        run(tmp_path, budget_minutes=0.1)


def test_too_small_a_budget_writes_no_plan(tmp_path):
    with pytest.raises(ConfigError, match="is too little"):
        run(tmp_path, budget_minutes=1e-5)
    assert not list(tmp_path.rglob("*.json"))
