from __future__ import annotations

import pytest
import tiny
from sweep import synthetic

from clipdistill.stages.workspace import Workspace
from clipdistill.sweep import trial as module
from clipdistill.sweep.axes import Axis, trial_config
from clipdistill.sweep.trial import objective_key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial")
    tiny.run_toml(folder)
    tiny.teacher_folder(folder / "other", seed=1)
    return folder


MEMBERS = {"members": [{"model": "local-dir:teacher"}, {"model": "local-dir:other"}]}


@pytest.mark.parametrize(
    ("key", "value", "shared"),
    [
        ("train.lr", 1e-2, True),
        ("data.fraction", 0.5, True),
        ("loss.preset", "clip", True),
        ("features.weight", 2.0, True),
        ("cache.probe_rows", 2, True),
        ("cache.views", 2, False),
        ("cache.dtype", "float32", False),
        ("teacher.model", "local-dir:other", False),
        ("teacher.precision", "bf16", False),
        ("train.mode", "live", False),
        ("data.test", "val", False),
    ],
)
def test_trials_share_a_cache_where_its_rows_are_the_same(folder, key, value, shared):
    base = synthetic.config(folder)
    changed = trial_config(base, folder, {key: value})
    assert (module._cache_inputs(base) == module._cache_inputs(changed)) is shared


def test_an_ensemble_s_way_of_speaking_needs_no_other_cache(folder):
    base = synthetic.config(folder, teacher=MEMBERS)
    combined = trial_config(base, folder, {"teacher.combine": "probabilities"})
    assert module._cache_inputs(base) == module._cache_inputs(combined)
    heavier = {"members": [{**MEMBERS["members"][0], "weight": 2.0}, MEMBERS["members"][1]]}
    assert module._cache_inputs(base) == module._cache_inputs(trial_config(base, folder, {"teacher": heavier}))
    alone = trial_config(base, folder, {"teacher": {"model": "local-dir:other"}})
    assert module._cache_inputs(base) != module._cache_inputs(alone)


def test_a_cache_is_stored_when_every_live_member_s_is(folder, tmp_path):
    workspace = Workspace(synthetic.config(folder, teacher=MEMBERS), tmp_path)
    for member in workspace.config.teacher.members:
        assert not module._is_stored(workspace)
        place = workspace.cache_of(member)
        place.mkdir(parents=True)
        (place / "manifest.json").write_text("{}")
    assert module._is_stored(workspace)
    adopted = synthetic.config(folder, teacher={"embeddings": "train", "logit_scale": 100.0})
    assert module._is_stored(Workspace(adopted, tmp_path / "none"))


def test_where_teachers_differ_right_answers_decide_and_not_agreement(folder):
    retrieval = synthetic.config(folder)
    classes = synthetic.config(folder, task={"kind": "classification"})
    settings, teachers = [Axis("train.lr", (1, 2))], [Axis("train.lr", (1, 2)), Axis("teacher.model", ("a", "b"))]
    assert objective_key(retrieval, settings) == objective_key(classes, settings) == "score"
    assert objective_key(retrieval, teachers) == "success10_text_to_image"
    assert objective_key(classes, teachers) == "top1"
