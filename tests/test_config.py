import dataclasses
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from clipdistill.config import RunConfig, Section, evaluation_sets, known_sets
from clipdistill.config.base import Weight
from clipdistill.core.errors import ConfigError

BASE = {"name": "a", "data": {"train": ["pictures"], "val": "val.csv"}, "teacher": {"model": "ViT-B-32"}}


@pytest.fixture
def base(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("val.csv", "a.csv", "b.csv"):
        (tmp_path / name).touch()
    return tmp_path


def parse(base, **sections):
    raw = {**BASE, **sections}
    return RunConfig.parse(raw, base)


def test_the_base_may_be_a_string(base):
    assert RunConfig.parse(BASE, str(base)) == parse(base)


def faults(base, **sections):
    with pytest.raises(ConfigError) as caught:
        parse(base, **sections)
    return caught.value.faults


def test_paths_start_at_the_file_and_sources_take_short_forms(base):
    path = base / "run.toml"
    path.write_text(
        'name = "a"\n[data]\ntrain = ["pictures", {path = "a.csv", captions = "title", weight = 2}]\ntest = "b.csv"\n'
        '[teacher]\nmodel = "ViT-B-32"\n[train]\nlr = 1\n'
    )
    config = RunConfig.load(path, ["train.steps=7", "seed=3"])
    assert [source.path for source in config.data.train] == [str(base / "pictures"), str(base / "a.csv")]
    assert config.data.train[1].captions == ("title",)
    assert config.data.train[1].weight == 2.0
    assert config.data.test["test"][0].path == str(base / "b.csv")
    assert (config.train.steps, config.seed, config.train.lr) == (7, 3, 1.0)


def test_the_resolved_file_reads_back_equal(base):
    config = parse(base, data={**BASE["data"], "test": {"one": "a.csv", "two": ["b.csv"]}}, train={"betas": [0.8, 0.9]})
    (base / "resolved.toml").write_text(config.to_toml())
    assert RunConfig.load(base / "resolved.toml") == config
    assert RunConfig.load(str(base / "resolved.toml")) == config


def test_every_fault_is_told_at_once(base):
    found = faults(
        base,
        data={"train": "nowhere", "vla": 3},
        teacher={"model": "ViT-B-32", "embeddings": "none"},
        train={"stpes": 3, "precision": "fp8", "lr": -1, "batch": True},
    )
    text = "\n".join(found)
    assert "data.vla: unknown key; did you mean 'val'?" in text
    assert "data.train: no such file or folder: nowhere" in text
    assert "train.stpes: unknown key; did you mean 'steps'?" in text
    assert "train.precision: 'fp8' is not one of auto, fp32, bf16, fp16" in text
    assert "train.lr:" in text
    assert "train.batch:" in text
    assert "give either teacher.model or teacher.embeddings" in text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"batch": 0}}, "nothing to train on"),
        ({"data": {}, "train": {}}, "data.train: train.batch asks for pairs"),
        ({"evaluate": {"sets": ["tset"]}}, "evaluate.sets: no set named 'tset'"),
        ({"cache": {"view_scale": [0.9, 0.1]}}, "cache.view_scale"),
        ({"data": {**BASE["data"], "hold_out": {"val": 0.1}}}, "data.hold_out.val: rows are held out"),
        ({"data": {**BASE["data"], "test": {"val": "a.csv"}}}, "not a name for an evaluation set"),
        ({"data": {**BASE["data"], "test": "*.tsv"}}, "nothing matches"),
        ({"loss": {"temperature": 0}}, "loss.temperature"),
        ({"loss": {"clip": float("nan")}}, "loss.clip"),
        ({"loss": {"preset": "defualt"}}, "did you mean 'default'"),
        ({"teacher": {"embeddings": "pictures"}}, "logit_scale"),
        ({"student": {"image_weights": "no.safetensors"}}, "student.image_weights: no such file"),
        ({"seed": "x"}, "seed:"),
        ({"task": {"kind": "classification", "templates": []}}, "task.templates: empty"),
        ({"task": {"kind": "classification", "templates": ["a photo"]}}, "task.templates: 'a photo' has no {}"),
        ({"task": {"kind": "classification", "templates": ["{}", "{}"]}}, "task.templates: a template is given twice"),
        ({"task": {"kind": "classification", "names": {"n1": " "}}}, "task.names.n1: a blank name"),
        ({"task": {"kind": "classification", "temperature": 0}}, "task.temperature"),
        ({"task": {"kind": "classification", "labels": -1}}, "task.labels"),
        ({"task": {"kind": "classificatoin"}}, "did you mean 'classification'"),
        ({"task": {"kind": "classification"}, "train": {"mode": "mutual"}}, 'train.mode: "mutual" changes'),
        ({"task": {"kind": "classification"}, "student": {"image": "teacher"}}, "task.kind: "),
        (
            {"task": {"kind": "classification"}, "data": {"images": "a.csv"}, "train": {"batch": 0, "batch_images": 4}},
            "data.train: missing: it says which classes there are",
        ),
        (
            {"task": {"kind": "classification"}, "data": {"train": "a.csv", "hold_out": {"val": 0.1, "by": "caption"}}},
            'data.hold_out.by: "caption" would hold out whole classes',
        ),
        ({"data": {"train": {"path": "pictures", "format": "classes"}}}, "data.train: format classes and label are"),
        ({"data": {"train": "a.csv", "val": {"path": "val.csv", "label": "x"}}}, "data.val: format classes and label"),
        ({"student": {"image": "teacher"}, "export": {"layouts": "immich"}}, "layouts: immich needs a picture tower"),
        ({"export": {"layouts": ["tritn"]}}, "is not one of"),
    ],
)
def test_faults(base, sections, message):
    assert any(message in fault for fault in faults(base, **sections)), faults(base, **sections)


def ensemble(*members, **more):
    return {"teacher": {"members": list(members), **more}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (ensemble({"model": "ViT-B-32"}), "teacher.members needs two teachers or more; for one give teacher.model"),
        (ensemble({"model": "a"}, {"model": "b"}, model="c"), "teacher.model and teacher.embeddings do not go with it"),
        (ensemble({"model": "a"}, {"model": "b"}, logit_scale=9), "teacher.logit_scale: give each of teacher.members"),
        (ensemble({"model": "a"}, {}), "teacher.members.1: give each member either model or embeddings"),
        (ensemble({"model": "a"}, {"embeddings": "pictures"}), "teacher.members.1.logit_scale: missing"),
        (ensemble({"model": "a"}, {"model": "b", "weight": 0}), "teacher.members.1.weight: input should be greater"),
        (ensemble({"model": "a", "scale": -1}, {"model": "b"}), "teacher.members.0.scale: input should be greater"),
        (ensemble({"model": "a"}, {"model": "b", "logit_scale": 9}), "a model brings its own logit_scale"),
        (
            ensemble({"model": "a"}, {"embeddings": "pictures", "logit_scale": 9, "device": "cpu"}),
            "teacher.members.1: embeddings are there already, so device would do nothing",
        ),
        (
            ensemble({"model": "a"}, {"model": "a", "weight": 2}),
            "teacher.members.1: the same teacher as teacher.members.0",
        ),
        (
            ensemble({"model": "a", "pretrained": "x/best.pt"}, {"model": "a", "pretrained": "y/best.pt"}),
            "teacher.members.1.cache: a:best.pt would store its embeddings in the same place as teacher.members.0",
        ),
        (
            ensemble({"model": "a", "cache": "c/d"}, {"model": "b", "cache": "./c"}),
            "teacher.members.1.cache: b would store its embeddings in the same place as teacher.members.0 (./c)",
        ),
        (ensemble({"model": "a"}, {"model": "b"}, combine="mean"), "teacher.combine: 'mean' is not one of logits,"),
        ({"teacher": {"model": "a", "combine": "embeddings"}}, "teacher.combine says how teacher.members are combined"),
        (
            ensemble({"model": "a"}, {"embeddings": "no", "logit_scale": 9}),
            "teacher.members.1.embeddings: no such file",
        ),
        (
            {**ensemble({"model": "a"}, {"model": "b"}), "train": {"mode": "mutual"}},
            "trains one teacher with the student",
        ),
        ({**ensemble({"model": "a"}, {"model": "b"}), "student": {"image": "teacher"}}, "keeps one teacher's picture"),
        (
            {**ensemble({"model": "a"}, {"embeddings": "pictures", "logit_scale": 9}), "train": {"mode": "live"}},
            'teacher.members.1: train.mode = "live" runs the teacher, and embeddings are no teacher to run',
        ),
    ],
)
def test_faults_of_an_ensemble(base, sections, message):
    assert any(message in fault for fault in faults(base, **sections)), faults(base, **sections)


def test_members_take_paths_from_the_files_folder_and_read_back_equal(base):
    (base / "weights.pt").touch()
    config = parse(
        base,
        **ensemble(
            {"model": "local-dir:pictures", "weight": 2, "cache": "one"},
            {"model": "ViT-B-32", "pretrained": "weights.pt"},
            {"embeddings": "pictures/../pictures", "logit_scale": 100},
            device="cpu",
        ),
    )
    first, second, third = config.teacher.members
    assert (first.model, first.cache) == (f"local-dir:{base}/pictures", str(base / "one"))
    assert second.pretrained == str(base / "weights.pt")
    assert third.embeddings == str(base / "pictures/../pictures")
    assert [member.folder for member in config.teacher.members] == ["pictures", "ViT-B-32_weights.pt", "pictures"]
    (base / "resolved.toml").write_text(config.to_toml())
    assert RunConfig.load(base / "resolved.toml") == config


def test_checks_add_their_faults(base):
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse({**BASE, "nmae": 1}, base, checks=[lambda raw, _: [f"teacher: {raw['teacher']['model']}!"]])
    assert caught.value.faults == ["nmae: unknown key; did you mean 'name'?", "teacher: ViT-B-32!"]


def test_sets(base):
    config = parse(base, data={**BASE["data"], "test": {"one": "a.csv", "two": "b.csv"}})
    assert evaluation_sets(config) == ("one", "two")
    assert known_sets(config) == ("train", "val", "one", "two")
    assert evaluation_sets(parse(base)) == ("val",)
    held = parse(base, data={"train": "pictures", "hold_out": {"val": 0.1, "test": 0.1}})
    assert evaluation_sets(held) == ("test",)
    assert known_sets(held) == ("train", "val", "test")


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += _keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def test_the_loss_presets_are_those_of_the_losses():
    from clipdistill.config.loss import Preset
    from clipdistill.losses.presets import PRESETS

    assert set(Preset.__args__) == set(PRESETS)


def test_the_terms_of_the_loss_are_those_of_the_losses():
    from clipdistill.config.loss import TERMS, LossConfig
    from clipdistill.losses.weights import LossWeights

    numbers = {name for name, field in LossConfig.model_fields.items() if Weight in get_args(field.annotation)}
    assert set(TERMS) == numbers
    weights = {field.name: field.default for field in dataclasses.fields(LossWeights)}
    assert {name: weights[name] for name in TERMS} == dict.fromkeys(TERMS, 0.0)


def test_the_losss_own_faults_are_reported_with_the_others(base):
    schedule = {"clop": [[0.0, 1.0]], "clip": [[0.5, 1.0], [0.1, -1.0]], "affinity": []}
    loss = {"schedule": schedule, "queue": 1.0, "queue_rows": 1}
    assert "loss.balance: 'learned' is not one of fixed, uncertainty; valid: fixed, uncertainty" in faults(
        base, loss={"balance": "learned"}
    )
    found = faults(base, loss=loss, name=3)
    assert any(fault.startswith("name: ") for fault in found)
    for fault in (
        "loss.schedule.clop: there is no such weight; did you mean 'clip'?",
        "loss.schedule.clip: factors are finite numbers, 0 or more; got -1.0",
        "loss.schedule.clip: shares rise from point to point; got 0.5 and then 0.1",
        "loss.schedule.affinity: has no points; give [[share, factor], ...]",
        "loss.queue_rows: loss.queue compares rows, so it needs 2 or more, got 1",
    ):
        assert fault in found


def test_a_schedule_survives_being_written_as_toml(base):
    config = parse(base, loss={"schedule": {"clip": [[0, 0], [0.5, 1]]}, "balance": "uncertainty"})
    (base / "again.toml").write_text(config.to_toml(), encoding="utf-8")
    assert RunConfig.load(base / "again.toml").loss == config.loss
    assert config.loss.schedule == {"clip": ((0.0, 0.0), (0.5, 1.0))}


@pytest.mark.parametrize("mode", ["live", "mutual"])
def test_a_queue_needs_stored_embeddings(base, mode):
    found = faults(base, loss={"queue": 1.0}, train={"mode": mode})
    assert any(fault.startswith("loss.queue: its rows are the teacher's stored") and mode in fault for fault in found)


def test_the_keys_are_frozen():
    """A new key is a promise: it is added here on purpose."""
    frozen = (Path(__file__).parent / "config_keys.txt").read_text(encoding="utf-8").split()
    assert sorted(_keys(RunConfig)) == frozen
