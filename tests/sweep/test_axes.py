from __future__ import annotations

import itertools
import shutil

import pytest
import tiny

from clipdistill.config import RangeConfig, RunConfig
from clipdistill.core.errors import ConfigError
from clipdistill.sweep.axes import Axis, check_values, config_keys, label, read_axes, trial_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axes")
    tiny.run_toml(folder)
    shutil.copytree(folder / "teacher", folder / "other")
    return folder


def config(folder, axes, **sweep):
    values = {"axes": axes, **sweep}
    return RunConfig.load(folder / "run.toml").model_copy(
        update={"sweep": RunConfig.parse(BASE | {"sweep": values}, folder).sweep}
    )


BASE = {"name": "a", "data": {"train": "train", "val": "val"}, "teacher": {"model": "local-dir:teacher"}}


def faults(folder, axes, **sweep):
    with pytest.raises(ConfigError) as caught:
        read_axes(config(folder, axes, **sweep).sweep)
    return "\n".join(caught.value.faults)


def test_every_key_of_the_configuration_is_known():
    frozen = (tiny.Path(__file__).parent.parent / "config_keys.txt").read_text().split()
    assert set(frozen) <= set(config_keys())
    assert {"student", "student.inherit", "loss"} <= set(config_keys())


def test_tables_in_tables_are_dotted_keys(folder):
    (folder / "nested.toml").write_text(
        (folder / "run.toml").read_text()
        + '[sweep.axes]\nloss.temperature = [1.0, 2]\n"train.lr" = {low = 1e-4, high = 1e-2, log = true}\n'
        'student = [{image = "nano", text = "nano"}]\n'
    )
    sweep = RunConfig.load(folder / "nested.toml", ["sweep.axes.data.fraction={low=0.5, high=1, step=0.25}"]).sweep
    assert set(sweep.axes) == {"loss.temperature", "train.lr", "student", "data.fraction"}
    assert sweep.axes["loss.temperature"] == (1.0, 2)
    assert sweep.axes["train.lr"] == RangeConfig(low=1e-4, high=1e-2, log=True)
    assert sweep.axes["student"] == ({"image": "nano", "text": "nano"},)
    loaded = RunConfig.load(folder / "nested.toml")
    (folder / "again.toml").write_text(loaded.to_toml())
    assert RunConfig.load(folder / "again.toml") == loaded


def test_ranges_become_lists_where_they_have_points(folder):
    axes = {
        axis.key: axis
        for axis in read_axes(
            config(
                folder,
                {
                    "loss.temperature": {"low": 0.1, "high": 0.7, "step": 0.1},
                    "student.dim": {"low": 8, "high": 24, "step": 8},
                    "train.accumulation": {"low": 1, "high": 3},
                    "train.batch": {"low": 4, "high": 4096, "log": True},
                    "train.lr": {"low": 1, "high": 2},
                },
            ).sweep
        )
    }
    assert axes["loss.temperature"].values == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert axes["student.dim"].values == (8, 16, 24)
    assert axes["train.accumulation"].values == (1, 2, 3)
    assert axes["train.batch"] == Axis("train.batch", (), 4, 4096, log=True, whole=True)
    assert axes["train.lr"] == Axis("train.lr", (), 1.0, 2.0)
    assert [axes[key].kind for key in axes] == ["choice", "capacity", "choice", "choice", "choice"]


@pytest.mark.parametrize(
    ("axes", "sweep", "message"),
    [
        ({}, {}, "no axis is given"),
        (
            {"loss.temprature": [1]},
            {},
            "no key 'loss.temprature' in the configuration; did you mean 'loss.temperature'?",
        ),
        ({"temperature": [1]}, {}, "did you mean 'task.temperature'?"),
        ({"seed": [1, 2]}, {}, "seed cannot be an axis: set sweep.seeds instead"),
        ({"sweep.trials": [1]}, {}, "a sweep does not change itself"),
        ({"data.hold_out.val": [0.1]}, {}, "the trials are compared on what it sets aside"),
        ({"student": [{"dim": 8}], "student.dim": [8]}, {}, "student.dim is a part of student"),
        ({"student": ["nano"]}, {}, 'student is a section: its values are tables such as {...}, got "nano"'),
        ({"loss.preset": {"low": 1, "high": 2}}, {}, "loss.preset takes no numbers"),
        ({"student.dim": {"low": 1.5, "high": 3}}, {}, "student.dim takes whole numbers only"),
        ({"train.lr": {"low": 1, "high": 2}}, {"sampler": "grid"}, "train.lr: a grid needs a list of values or a step"),
        ({"train.lr": [1e-3, 0.001]}, {}, "the value 0.001 is given twice"),
    ],
)
def test_faults_of_axes(folder, axes, sweep, message):
    assert message in faults(folder, axes, **sweep)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"low": 2, "high": 1}, "low must be below high, got 2 and 1"),
        ({"low": 0, "high": 1, "log": True}, "low must be above 0"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "give either log or step"),
        ({"low": 1, "hihg": 2}, "hihg: unknown key; did you mean 'high'?"),
        ({"low": float("nan"), "high": 2}, "low"),
        ([], "train.lr"),
        (3, "train.lr"),
    ],
)
def test_faults_of_an_axis_s_form(folder, axis, message):
    with pytest.raises(ConfigError) as caught:
        config(folder, {"train.lr": axis})
    assert message in str(caught.value)
    assert "sweep.axes.train.lr" in str(caught.value)


def test_a_trial_s_configuration_is_the_base_with_its_values(folder):
    base = config(folder, {"train.lr": [1]})
    made = trial_config(
        base,
        folder,
        {
            "train.lr": 1e-2,
            "student": {"text": "tiny", "inherit": {"width": 0.25}},
            "loss.schedule": {"clip": [[0, 1]]},
        },
    )
    assert (made.train.lr, made.student.text, made.student.inherit.width) == (1e-2, "tiny", 0.25)
    assert made.student.image == base.student.image
    assert made.loss.schedule == {"clip": ((0.0, 1.0),)}
    assert made.sweep == type(made.sweep)()
    same = {"student", "loss", "train", "sweep"}
    assert made.model_dump(exclude=same) == base.model_dump(exclude=same)


def test_another_teacher_takes_the_place_of_the_whole_old_one(folder):
    base = config(folder, {"train.lr": [1]})
    made = trial_config(base, folder, {"teacher": {"embeddings": "train", "logit_scale": 100.0}})
    assert made.teacher.model is None
    assert made.teacher.embeddings == str(folder / "train")
    assert made.teacher.batch == base.teacher.batch
    assert (
        trial_config(base, folder, {"teacher.model": "local-dir:other"}).teacher.model
        == f"local-dir:{folder / 'other'}"
    )


def test_refused_values_are_named_with_their_axis_before_anything_runs(folder):
    sweep = config(
        folder,
        {
            "loss.preset": ["default", "defualt"],
            "student.image": ["nano", "mobilenet_nothing"],
            "loss.temperature": {"low": -1, "high": 1},
        },
    )
    with pytest.raises(ConfigError) as caught:
        check_values(sweep, folder, read_axes(sweep.sweep))
    assert [fault.split(" is refused")[0] for fault in caught.value.faults] == [
        'sweep.axes: loss.preset = "defualt"',
        'sweep.axes: student.image = "mobilenet_nothing"',
        "sweep.axes: loss.temperature = -1.0",
    ]
    assert "did you mean 'default'?" in caught.value.faults[0]


def test_a_value_that_fits_another_axis_s_is_kept(folder):
    sweep = config(folder, {"train.batch": [0, 8], "train.batch_texts": [0, 4]})
    check_values(sweep, folder, read_axes(sweep.sweep))
    alone = config(folder, {"train.batch": [0, 8]})
    with pytest.raises(ConfigError, match=r"train.batch = 0 is refused: train.batch: nothing to train on"):
        check_values(alone, folder, read_axes(alone.sweep))


def test_labels_tell_values_apart_and_do_not_depend_on_order():
    values = [1, 1.5, "1", True, None, [1], {"a": 1}]
    assert all(label(a) != label(b) for a, b in itertools.combinations(values, 2))
    assert label({"b": 1, "a": 2}) == label({"a": 2, "b": 1})
