"""Inherited students through the stages: calibration rows, whole runs, phases, faults of the configuration."""

from __future__ import annotations

import pytest
import tiny
import torch

from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.stages.inherit import calibration, cut_again, phases
from clipdistill.stages.inputs import load_data, open_cache
from clipdistill.stages.run import run
from clipdistill.stages.teachers import first_teacher, open_teachers
from clipdistill.stages.train import new_student
from clipdistill.stages.workspace import Workspace, read_metrics
from clipdistill.towers.inheritance.tower import tower_of
from clipdistill.towers.student import DualEncoder

INHERIT = ("student.image=inherit", "student.text=inherit", "student.image_init=pretrained")


def workspace(folder, *overrides, out="out"):
    path = folder / "run.toml"
    if not path.exists():
        tiny.run_toml(folder)
    made = Workspace(RunConfig.load(path, ["train.threads=1", *INHERIT, *overrides]), folder / out)
    made.begin()
    return made


def untrained(folder, *overrides):
    made = workspace(folder, *overrides)
    data = load_data(made)
    teachers = open_teachers(made.config)
    cache, data = open_cache(made, data, teachers)
    return new_student(made.config, data, cache, first_teacher(teachers)), first_teacher(teachers), data


def test_the_whole_teacher_is_the_student_before_training(tmp_path):
    student, teacher, data = untrained(tmp_path, "student.inherit={depth=1.0, width=1.0}")
    pairs = data.sets["train"].pairs
    pictures, texts = [pair.picture for pair in pairs], [pair.captions[0] for pair in pairs]
    assert (student.encode_images(pictures) == teacher.encode_images(pictures)).all()
    assert (student.encode_texts(texts) == teacher.encode_texts(texts)).all()


def test_a_narrower_student_begins_on_the_teachers_principal_axes(tmp_path):
    student, teacher, data = untrained(tmp_path, "student.inherit={depth=1.0, width=1.0}", "student.dim=12")
    texts = [pair.captions[0] for pair in data.sets["train"].pairs]
    back = student.to_teacher_vectors(student.encode_texts(texts), "text")
    assert (back * teacher.encode_texts(texts)).sum(axis=1).mean() > 0.97


def test_calibration_rows_do_not_depend_on_their_order(tmp_path):
    made = workspace(tmp_path, "student.inherit={calibration=5}")
    teacher, data = first_teacher(open_teachers(made.config)), load_data(made)
    rows = calibration(made.config, data, teacher.transform, teacher.tokenizer)
    assert (rows.pixels.shape, rows.tokens.shape[0]) == ((5, 3, 32, 32), 5)
    source = data.sets["train"]
    object.__setattr__(source, "pairs", tuple(reversed(source.pairs)))
    again = calibration(made.config, data, teacher.transform, teacher.tokenizer)
    assert torch.equal(rows.pixels, again.pixels)
    assert torch.equal(rows.tokens, again.tokens)


def test_a_run_from_end_to_end_is_the_same_twice(tmp_path):
    report = run(workspace(tmp_path, "cache.folder=shared"))
    assert report["sizes"]["student"]["parameters"] < report["sizes"]["teacher"]["parameters"]
    again = run(workspace(tmp_path, "cache.folder=shared", out="again"), until="train")
    assert again["fingerprint"] == report["student_fingerprint"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("teacher={embeddings = 'train', logit_scale = 1.0}",),
            'student.image: "inherit" cuts the tower out of one live model',
        ),
        (("student.image_init=random",), 'student.image_init: "random", but student.image = "inherit"'),
        (("student.text_init=random",), 'student.text_init: "random", but student.text = "inherit"'),
        (("student.inherit.width=1.5",), "student.inherit.width"),
        (("student.inherit.depth=0",), "student.inherit.depth"),
        (("student.inherit.schedule=[0.25, 0.5]",), "must be falling shares"),
        (("student.inherit.schedule=[0.5, 0.5]",), "must be falling shares"),
        (("student.inherit.schedule=[0.5, 0]",), "student.inherit.schedule"),
        (("student.inherit={schedule=[0.5, 0.25], mlp=0.5}",), "student.inherit.mlp: a schedule's shares hold"),
        (("student.inherit.schedule=[0.5, 0.25]", "train.steps=1"), "train.steps: 1 cannot be divided among 2"),
        (
            ("student.inherit.schedule=[0.5, 0.25]", "train.budget_minutes=1"),
            "train.budget_minutes: a schedule divides",
        ),
        (
            ("student.inherit.schedule=[0.5, 0.25]", "features.image=[{teacher = 'a', student = 'b'}]"),
            "features: a schedule changes which",
        ),
        (
            ("student.inherit.schedule=[0.5]", "student.image=nano", "student.text=nano"),
            "student.inherit.schedule: no tower is inherited",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as raised:
        workspace(tmp_path, *overrides)
    assert message in str(raised.value)


def test_only_one_tower_is_cut_where_one_is_named(tmp_path):
    student, *_ = untrained(tmp_path, "student.text=nano", "student.text_init=random")
    assert tower_of(student.model, "image").shape.width == 16
    assert tower_of(student.model, "text").shape.width != 16


SCHEDULE = ("student.inherit.schedule=[1.0, 0.5]", "train.steps=7", "cache.folder=shared")


def shape(student, side="image"):
    return tower_of(student.model, side).shape


@pytest.mark.slow
def test_a_schedule_is_passed_through_phase_by_phase(tmp_path):
    lines = []
    made = workspace(tmp_path, *SCHEDULE)
    report = run(made, on_log=lines.append)
    student = DualEncoder.load(made.student)
    large = DualEncoder.load(made.training / "phase-1" / "best")
    assert (shape(large).width, shape(student).width, shape(student, "text").layers) == (32, 16, 1)
    assert large.tokenizer.fingerprint == student.tokenizer.fingerprint
    assert [len(read(made, phase, "loss")) for phase in (1, 2)] == [3, 4]
    steps = [line["step"] for line in read_metrics(made) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in lines if "loss" in line] == steps
    assert (made.folder / "report.html").exists()
    assert report["student_fingerprint"] == student.fingerprint
    _resumes_after_a_stop_in_each_phase(tmp_path, student.fingerprint)


def read(made, phase, name):
    return [line for line in read_metrics(made) if line["phase"] == phase and name in line]


def _resumes_after_a_stop_in_each_phase(folder, wanted):
    for number, last in enumerate((2, 5)):

        def stop(line, last=last):
            if line["step"] == last and "loss" in line:
                raise KeyboardInterrupt

        made = workspace(folder, *SCHEDULE, "train.save_every=1", out=f"stopped{number}")
        with pytest.raises(KeyboardInterrupt):
            run(made, until="train", on_log=stop)
        assert not made.student.exists()
        assert run(made, until="train")["fingerprint"] == wanted
    with pytest.raises(MismatchError):
        run(workspace(folder, *SCHEDULE, "student.inherit.schedule=[1.0, 0.4]", out="stopped0"), until="train")


def test_a_phase_begins_with_the_trained_student_cut_to_the_teachers_measures(tmp_path):
    student, teacher, data = untrained(tmp_path, "student.inherit={schedule=[1.0, 0.5], width_by='first', refit=false}")
    student.model.visual.conv1.weight.data.mul_(2)
    made = workspace(tmp_path, "student.inherit={schedule=[1.0, 0.5], width_by='first', refit=false}")
    parts = phases(made.config, made.training, "x")
    smaller = cut_again(made.config, data, student, teacher, parts[1].rule)
    assert torch.equal(smaller.model.visual.conv1.weight, student.model.visual.conv1.weight[:16])
    assert torch.equal(smaller.model.text.token_embedding.weight, student.model.text.token_embedding.weight[:, :16])
    assert torch.equal(smaller.model.logit_scale, student.model.logit_scale)
    whole = cut_again(made.config, data, student, teacher, parts[0].rule)
    assert whole.fingerprint == student.fingerprint
    seeds = {part.seed for part in parts}
    prints = {part.fingerprint for part in parts}
    assert len(seeds) == len(prints) == 2


def test_a_tower_that_is_not_inherited_passes_through_a_schedule_as_it_is(tmp_path):
    only = ("student.inherit.schedule=[1.0, 0.5]", "student.text=nano", "student.text_init=random", "student.dim=12")
    student, teacher, data = untrained(tmp_path, *only)
    made = workspace(tmp_path, *only)
    smaller = cut_again(made.config, data, student, teacher, phases(made.config, made.training, "x")[1].rule)
    texts = [pair.captions[0] for pair in data.sets["train"].pairs]
    assert (smaller.encode_texts(texts) == student.encode_texts(texts)).all()
    rows = smaller.encode_texts(texts)
    assert (smaller.to_teacher_vectors(rows, "text") == student.to_teacher_vectors(rows, "text")).all()
    assert shape(smaller).width == 16
