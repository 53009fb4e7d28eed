import json

import pytest
import tiny

from clipdistill.config import RunConfig, SourceConfig
from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.stages.inputs import load_data, name_checks, open_cache
from clipdistill.stages.teachers import open_teachers
from clipdistill.stages.train import training_data
from clipdistill.stages.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    path = tiny.run_toml(tmp_path)
    made = Workspace(RunConfig.load(path), tmp_path / "out")
    made.begin()
    return made


def changed(workspace, **sections):
    """The same run with other values: ``data={"max_rejected": 0}``."""
    new = {
        name: getattr(workspace.config, name).model_copy(update=values) if isinstance(values, dict) else values
        for name, values in sections.items()
    }
    return Workspace(workspace.config.model_copy(update=new), workspace.folder)


def test_sets_are_loaded_in_order_with_every_key_once(workspace):
    data = load_data(workspace)
    assert {name: len(source) for name, source in data.sets.items()} == {"train": 24, "val": 8, "test": 10}
    keys = [pair.key for pair in data.pairs]
    assert len(set(keys)) == len(keys) == 42
    assert data.fingerprint == load_data(workspace).fingerprint
    less = data.without({keys[0]})
    assert len(less.pairs) == 41
    assert less.fingerprint != data.fingerprint


def test_rows_are_held_out_of_train_by_hash(tmp_path):
    tiny.teacher_folder(tmp_path / "teacher")
    tiny.image_folder(tmp_path / "all", 60)
    (tmp_path / "run.toml").write_text(
        'name = "a"\n[data]\ntrain = "all"\n'
        'hold_out = {val = 0.2, test = 0.2}\n[teacher]\nmodel = "local-dir:teacher"\n'
    )
    workspace = Workspace(RunConfig.load(tmp_path / "run.toml"), tmp_path / "out")
    data = load_data(workspace)
    sizes = {name: len(source) for name, source in data.sets.items()}
    assert set(sizes) == {"train", "val", "test"}
    assert sum(sizes.values()) == 60
    assert 4 <= sizes["val"] <= 22
    again = load_data(workspace)
    assert [pair.key for pair in again.sets["val"].pairs] == [pair.key for pair in data.sets["val"].pairs]


def test_too_many_refused_rows_stop_the_run_and_are_listed_first(workspace, tmp_path):
    (tmp_path / "train" / "p003.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 42 rows were refused, and data\.max_rejected allows 0\.01"):
        load_data(workspace)
    row = json.loads(workspace.rejected.read_text())
    assert "p003" in row["key"]
    assert row["reason"]
    assert len(load_data(changed(workspace, data={"max_rejected": 1.0})).pairs) == 41
    assert len(load_data(workspace, limit=False).rejected) == 1


def test_a_picture_that_breaks_in_the_cache_is_left_out_of_the_data(workspace, tmp_path):
    path = tmp_path / "train" / "p003.png"
    path.write_bytes(path.read_bytes()[:200])
    loose = changed(workspace, data={"max_rejected": 2.0})
    data = load_data(loose)
    assert len(data.pairs) == 42
    cache, kept = open_cache(loose, data, open_teachers(loose.config))
    assert len(kept.sets["train"]) == 23
    assert not any("p003" in pair.key for pair in kept.pairs)
    assert "p003" in loose.rejected.read_text()
    again, kept_again = open_cache(loose, load_data(loose), open_teachers(loose.config))
    assert kept_again.fingerprint == kept.fingerprint
    assert again.fingerprint == cache.fingerprint


def test_force_never_removes_a_folder_that_is_not_a_cache(workspace, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("irreplaceable")
    other = changed(workspace, cache={"folder": str(precious)})
    with pytest.raises((DataError, MismatchError), match="precious"):
        open_cache(other, load_data(other), open_teachers(other.config), force=True)
    assert (precious / "thesis.txt").read_text() == "irreplaceable"


def test_names_are_checked_without_loading(tmp_path):
    raw = {"teacher": {"model": "ViT-B-23"}, "student": {"image": "nanoo", "text": "tinny"}}
    faults = "\n".join(name_checks(raw, tmp_path))
    assert "teacher.model: unknown model 'ViT-B-23'" in faults
    assert "student.image" in faults
    assert "student.text" in faults
    assert list(name_checks({"teacher": {"model": "ViT-B-32", "pretrained": "openai"}}, tmp_path)) == []


def test_a_stage_is_done_only_for_its_own_inputs(workspace):
    artefact = workspace.folder / "thing"
    assert not workspace.is_done("train", {"seed": 1}, artefact, force=False)
    artefact.write_text("x")
    workspace.mark_done("train", {"seed": 1})
    assert workspace.is_done("train", {"seed": 1}, artefact, force=False)
    with pytest.raises(MismatchError, match="seed does not match: expected 2, found 1"):
        workspace.is_done("train", {"seed": 2}, artefact, force=False)
    assert artefact.exists()
    assert not workspace.is_done("train", {"seed": 2}, artefact, force=True)
    assert not artefact.exists()


def test_a_stored_cache_of_another_precision_is_refused(workspace):
    data, teachers = load_data(workspace), open_teachers(workspace.config)
    fine = changed(workspace, cache={"dtype": "float32"})
    cache, _ = open_cache(fine, data, teachers)
    assert cache.dtype == "float32"
    assert open_cache(fine, data, teachers)[0].fingerprint == cache.fingerprint
    with pytest.raises(MismatchError, match=r"cache\.dtype does not match: expected float16, found float32"):
        open_cache(workspace, data, teachers)


def test_a_fraction_of_train_is_used_and_a_cache_of_all_rows_serves_it(workspace):
    data = load_data(workspace)
    teachers = open_teachers(workspace.config)
    cache, _ = open_cache(workspace, data, teachers)
    prints, before = {data.fingerprint}, set()
    for fraction in (0.3, 0.6):
        less = changed(workspace, data={"fraction": fraction})
        part = load_data(less)
        keys = {pair.key for pair in part.sets["train"].pairs}
        assert before < keys < {pair.key for pair in data.sets["train"].pairs}
        assert part.unused == 24 - len(keys)
        assert len(part.sets["val"]) == 8
        again, kept = open_cache(less, part, teachers)
        assert again.fingerprint == cache.fingerprint
        assert kept == part
        prints.add(part.fingerprint)
        before = keys
    assert len(prints) == 3


def test_a_cache_of_a_fraction_does_not_serve_more(workspace):
    teachers = open_teachers(workspace.config)
    less = changed(workspace, data={"fraction": 0.3})
    open_cache(less, load_data(less), teachers)
    with pytest.raises(MismatchError, match=r"data\.pictures does not match: expected rows for all 42"):
        open_cache(workspace, load_data(workspace), teachers)


def test_a_fraction_that_leaves_no_row_is_refused(workspace):
    with pytest.raises(ConfigError, match=r"data\.fraction: 1e-09 of 24 training rows leaves none"):
        load_data(changed(workspace, data={"fraction": 1e-9}))


def test_refused_rows_are_a_share_of_all_that_were_read_whatever_the_fraction(workspace, tmp_path):
    (tmp_path / "train" / "p003.txt").unlink()
    data = load_data(changed(workspace, data={"fraction": 0.1, "max_rejected": 0.03}))
    assert len(data.rejected) == 1
    assert len(data.sets["train"]) < 10


def test_weights_of_unpaired_sources_are_kept_and_decide_the_fingerprint(workspace, tmp_path):
    (tmp_path / "words.csv").write_text("text\na cat\na dog\n")
    (tmp_path / "more.csv").write_text("text\na dog\na cow\n")
    tiny.image_folder(tmp_path / "few", 2, 60)
    tiny.image_folder(tmp_path / "rest", 1, 65)

    def loaded(weight):
        texts = [
            SourceConfig(path=str(tmp_path / name), weight=w) for name, w in (("words.csv", 1.0), ("more.csv", weight))
        ]
        images = [SourceConfig(path=str(tmp_path / name), weight=w) for name, w in (("few", 1.0), ("rest", weight))]
        return load_data(changed(workspace, data={"texts": tuple(texts), "images": tuple(images)}))

    data = loaded(3.0)
    assert dict(zip(data.texts, data.text_weights, strict=True)) == {"a cat": 1.0, "a dog": 3.0, "a cow": 3.0}
    assert data.image_weights == (1.0, 1.0, 3.0)
    less = data.without({data.images[1].key})
    assert (len(less.images), less.image_weights) == (2, (1.0, 3.0))
    made = training_data(workspace.config, data)
    assert (made.image_weights, made.text_weights) == (data.image_weights, data.text_weights)
    assert data.fingerprint != loaded(1.0).fingerprint
    assert data.fingerprint == loaded(3.0).fingerprint
