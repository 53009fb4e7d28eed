"""The loop with a queue, masked pictures, a schedule, and what the losses themselves learn."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from training import little

from clipdistill.core import fingerprint
from clipdistill.core.errors import MismatchError
from clipdistill.training import loop
from clipdistill.training.batches import TrainingData
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(12))
DATA = TrainingData(PAIRS, (), (), tuple(little.TEXTS[40:50]))
EVERYTHING = {
    "clip": 1.0,
    "feature_cosine": 8.0,
    "interactive": 1.0,
    "vertical": 1.0,
    "queue": 1.0,
    "queue_rows": 7,
    "masked_feature": 4.0,
    "augmented_feature": 1.0,
    "balance": "uncertainty",
    "schedule": {"masked_feature": ((0.0, 0.0), (0.3, 1.0)), "clip": ((0.0, 1.0), (1.0, 0.0))},
}
STEPS = 6


class KilledError(Exception):
    pass


def train(folder=None, *, weights=EVERYTHING, until=None, fp="run", **settings):
    """A run, killed after the line of step ``until``."""
    lines = []

    def on_log(line):
        lines.append(line)
        if line["step"] == until:
            raise KilledError

    student, objective = little.student(drop=0.2), little.objective(**weights)
    chosen = {"steps": STEPS, "batch": 6, "batch_texts": 3, "accumulation": 2, "save_every": 2, "eval_every": 100}
    distill(
        student,
        little.Teacher(PAIRS),
        DATA,
        objective=objective,
        train=little.settings(**(chosen | settings)),
        seed=5,
        folder=folder,
        fingerprint=fp,
        on_log=on_log,
    )
    return student, objective, lines


def digests(student, objective) -> tuple[str, str]:
    return tuple(fingerprint.of_tensors(part.state_dict()) for part in (student.module, objective))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(folder)


@pytest.mark.slow
@pytest.mark.parametrize("until", [1, 3, 5])
def test_a_killed_run_goes_on_to_the_same_bits(until, whole, tmp_path):
    with pytest.raises(KilledError):
        train(tmp_path, until=until)
    student, objective, lines = train(tmp_path)
    assert lines[0]["step"] == until // 2 * 2 + 1
    assert digests(student, objective) == digests(*whole[1:3])
    paths = [sorted((folder / "checkpoints").glob("step-*"))[-1] for folder in (tmp_path, whole[0])]
    newest = [load_file(path / "objective.safetensors") for path in paths]
    assert newest[0].keys() == newest[1].keys()
    assert all(torch.equal(newest[0][name], newest[1][name]) for name in newest[0])


@pytest.mark.slow
def test_what_the_losses_learn_is_trained_reported_and_kept(whole):
    folder, _, objective, lines = whole
    fresh = little.objective(**EVERYTHING).state_dict()
    kept = load_file(folder / "checkpoints" / f"step-{STEPS:08d}" / "objective.safetensors")
    moved = {name for name, value in objective.state_dict().items() if not torch.equal(value, fresh[name])}
    names = [name for name in EVERYTHING if name not in ("queue_rows", "balance", "schedule")]
    assert moved == {
        *("logit_scale", "icl_scale", "vertical_scales"),
        *(f"fuse.{side}.{kind}" for side in ("image", "text") for kind in ("weight", "bias")),
        *(f"uncertainty.log_variances.{name}" for name in names),
    }
    assert kept.keys() == objective.state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in objective.state_dict().items())
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written if "queue" in line] == list(range(1, STEPS + 1))
    assert all(f"log_variance_{name}" in lines[-1] for name in names)
    assert [line["step"] for line in written if "masked_feature" in line] == list(range(2, STEPS + 1))


def test_a_resumed_run_of_another_balance_is_refused(tmp_path):
    train(tmp_path, weights={"feature_cosine": 1.0}, steps=1)
    with pytest.raises(MismatchError, match=r"objective.*log_variances"):
        train(tmp_path, weights={"feature_cosine": 1.0, "balance": "uncertainty"}, steps=2)


def statistics(student) -> list[torch.Tensor]:
    norms = [part for part in student.module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return [value for norm in norms for value in (norm.running_mean, norm.running_var)]


def test_masked_pictures_train_the_tower_but_not_its_statistics():
    plain, masked = (
        train(weights={"feature_cosine": 1.0} | more, steps=1, accumulation=1)[0]
        for more in ({}, {"masked_feature": 5.0})
    )
    assert all(map(torch.equal, statistics(plain), statistics(masked)))
    assert plain.fingerprint != masked.fingerprint


def test_the_tower_runs_once_where_no_masked_pictures_are_wanted(monkeypatch):
    calls = []
    embed = loop.DualEncoder.embed_pixels

    def counted(self, pixels):
        calls.append(len(pixels))
        return embed(self, pixels)

    monkeypatch.setattr(loop.DualEncoder, "embed_pixels", counted)
    late = {"masked_feature": ((0.0, 0.0), (0.4, 0.0), (1.0, 1.0))}
    train(weights={"feature_cosine": 1.0, "masked_feature": 1.0, "schedule": late}, steps=4, accumulation=1)
    assert len(calls) == 4 + 2  # at the shares 0.5 and 0.75, not at 0 and 0.25


def test_the_schedule_is_given_the_share_of_the_steps_that_is_done():
    ramp = {"clip": ((0.0, 1.0), (1.0, 0.0))}
    lines = train(weights={"clip": 1.0, "schedule": ramp, "student_scale": 10.0}, steps=4, accumulation=1)[2]
    losses = [line for line in lines if "clip" in line]
    assert [line["loss"] / line["clip"] for line in losses] == pytest.approx([1.0, 0.75, 0.5, 0.25], rel=1e-5)


def test_a_queue_works_without_pairs():
    lines = train(weights={"queue": 1.0, "queue_rows": 7}, batch=0, batch_texts=6, steps=2, accumulation=1)[2]
    assert all(line["queue"] > 0 for line in lines if "loss" in line)


def test_masked_features_follow_accumulation():
    """The mask of a picture does not depend on the part that it is in."""
    lines = [
        train(weights={"masked_feature": 1.0}, steps=1, batch_texts=0, accumulation=parts)[2][0] for parts in (1, 2)
    ]
    # Batch norms see other neighbours, so the values differ a little; the masks are the same.
    assert lines[0]["masked_feature"] == pytest.approx(lines[1]["masked_feature"], abs=0.2)
