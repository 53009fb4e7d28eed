"""From the configuration's losses to the objective that is trained."""

import json

import pytest
import tiny
from safetensors.torch import load_file

from clipdistill.config import LossConfig, RunConfig
from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.losses.presets import PRESETS
from clipdistill.losses.weights import TERM_WEIGHTS
from clipdistill.stages.run import run
from clipdistill.stages.train import loss_weights
from clipdistill.stages.workspace import Workspace


def test_every_key_of_the_section_reaches_the_weights():
    schedule = {"clip": ((0.0, 0.0), (0.5, 1.0))}
    given = {name: place + 1.0 for place, name in enumerate(TERM_WEIGHTS)}
    settings = {"mask_ratio": 0.5, "queue_rows": 77, "balance": "uncertainty", "schedule": schedule, "temperature": 2.0}
    found = loss_weights(LossConfig(preset="fd", **given, **settings))
    for name, value in (given | settings).items():
        assert getattr(found, name) == value


def test_what_is_not_given_is_the_presets():
    for name in PRESETS:
        assert loss_weights(LossConfig(preset=name)) == PRESETS[name]


def test_a_schedule_of_a_weight_that_the_preset_leaves_out_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.schedule\.clip: loss\.clip is 0"):
        loss_weights(LossConfig(preset="fd", schedule={"clip": ((0.0, 1.0),)}))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (["loss.preset=fd", "loss.schedule={clip = [[0, 1]]}"], "loss.clip is 0"),
        (["loss.preset=fd", "loss.feature_mse=0"], "every weight is 0"),
        (["loss.preset=clip", "train.batch=0", "train.batch_texts=4"], "loss.clip needs pictures paired with texts"),
    ],
)
def test_a_loss_that_cannot_be_trained_is_refused_before_anything_is_made(tmp_path, changes, fault):
    workspace = Workspace.of(RunConfig.load(tiny.run_toml(tmp_path), changes), tmp_path / "out")
    with pytest.raises(ConfigError, match=fault):
        run(workspace, until="train")
    assert not workspace.folder.exists()


def test_a_presets_weights_decide_the_run_not_its_name(tmp_path, monkeypatch):
    config = RunConfig.load(tiny.run_toml(tmp_path), ["loss.preset=fd", "train.steps=1", 'train.device="cpu"'])
    workspace = Workspace.of(config, tmp_path / "out")
    run(workspace, until="train")
    monkeypatch.setitem(loss_weights.__globals__, "PRESETS", {**PRESETS, "fd": PRESETS["clip_kd"]})
    with pytest.raises(MismatchError, match="loss does not match"):
        run(workspace, until="train")


@pytest.mark.slow
def test_a_whole_training_with_the_losses_that_learn_draw_and_mask(tmp_path):
    changed = [
        'loss.preset="clip_rd"',
        "loss.queue=1",
        "loss.queue_rows=12",
        "loss.masked_feature=2",
        "loss.augmented_feature=1",
        "loss.gradient=10",
        "loss.pseudo_relation=1",
        'loss.balance="uncertainty"',
        "loss.schedule={masked_feature = [[0, 0], [0.5, 1]]}",
        "student.dim=16",
        'train.device="cpu"',
    ]
    workspace = Workspace.of(RunConfig.load(tiny.run_toml(tmp_path), changed), tmp_path / "out")
    run(workspace, until="train")
    lines = [json.loads(line) for line in (workspace.training / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    terms = {"clip", "affinity", "feature_image", "feature_text", "interactive", "vertical", "cross", "gradient"}
    terms |= {"augmented_feature", "pseudo_relation", "queue", "masked_feature", "log_variance_queue"}
    assert terms <= last.keys()
    assert all(isinstance(last[name], float) for name in terms)
    shipped = [name for path in workspace.student.glob("*.safetensors") for name in load_file(path)]
    assert shipped
    assert not [name for name in shipped if any(word in name for word in ("fuse", "log_variances", "vertical"))]
