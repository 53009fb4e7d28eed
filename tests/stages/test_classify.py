"""A classification through the stages, on folders of three classes."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch

from clipdistill.config import RunConfig, StudentConfig
from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.stages.classify import save_classifier
from clipdistill.stages.inputs import load_data, open_cache
from clipdistill.stages.run import run, run_all
from clipdistill.stages.teachers import open_teachers
from clipdistill.stages.workspace import Workspace, read_metrics
from clipdistill.towers.classifier import Classifier

PURE = 'batch = 0\nbatch_images = 8\n[loss]\npreset = "fd"'


def workspace(folder, *overrides, out="out"):
    return Workspace(RunConfig.load(folder / "run.toml", overrides), folder / out)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole run, its texts trained too."""
    folder = tmp_path_factory.mktemp("classes")
    tiny.class_toml(folder)
    made = workspace(folder)
    return made, run_all(made), folder


@pytest.fixture
def small(tmp_path):
    tiny.class_toml(tmp_path, train=PURE)
    return tmp_path


@pytest.mark.slow
def test_a_run_reports_the_classification_and_ships_the_classifier(done):
    made, report, folder = done
    found = report["classification"]
    assert found["schema"] == "clipdistill.classification/1"
    assert [one["name"] for one in found["classes"]] == ["blue thing", "green thing", "red thing"]
    (measured,) = found["sets"]
    assert (measured["set"], measured["pictures"], measured["classes"]) == ("test", 12, 3)
    classifier = Classifier.load(made.student)
    pictures = sorted((folder / "test").rglob("*.png"))
    names = [path.parent.name.replace("_", " ") for path in pictures]
    guesses = classifier.classify(pictures)
    right = sum(guess.name == name for guess, name in zip(guesses, names, strict=True))
    assert measured["student"]["top1"]["value"] == pytest.approx(right / 12)
    assert "<h2>Classification</h2>" in made.report_html.read_text()
    assert "test: reliability" in made.report_html.read_text()
    assert "keeps" in made.report_html.read_text()


@pytest.mark.slow
def test_the_teacher_s_figures_are_its_zero_shot_classification(done):
    made, report, _ = done
    (teacher,) = open_teachers(made.config)
    vectors = []
    for name in ("blue thing", "green thing", "red thing"):
        mean = teacher.encode_texts([f"a photo of a {name}.", name]).astype(float).mean(axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    pairs = load_data(made).sets["test"].pairs
    images = teacher.encode_images([pair.picture for pair in pairs])
    truth = [sorted(tiny.COLOURS).index(pair.label) for pair in pairs]
    top = (images @ np.array(vectors).T).argmax(axis=1)
    assert report["classification"]["sets"][0]["teacher"]["top1"]["value"] == pytest.approx(np.mean(top == truth))


@pytest.mark.slow
def test_the_best_student_is_the_one_that_agrees_most_and_its_own_scale_is_shipped(done):
    made, _, _ = done
    scored = [row for row in read_metrics(made) if "score" in row]
    assert [row["step"] for row in scored] == [2, 4]
    best = max(scored, key=lambda row: row["score"])
    kept = json.loads((made.training / "best.json").read_text())
    assert kept["step"] == best["step"]
    assert Classifier.load(made.student).head.scale == best["class_scale"]
    assert all(0 <= row["agreement"] - row["score"] < 1 / 9 for row in scored)


@pytest.mark.slow
def test_retrieval_is_measured_with_one_prompt_a_class_and_search_works(done):
    from clipdistill.stages.index import search

    made, report, _ = done
    rows = report["evaluation"]["rows"]
    assert {row["queries"] for row in rows if row["direction"] == "text_to_image"} == {3}
    assert len(search(made, "a photo of a red thing.", 3)) == 3


@pytest.mark.slow
def test_a_second_run_keeps_all_and_another_task_is_a_mismatch(done):
    made, report, folder = done
    assert run(made) == report
    with pytest.raises(MismatchError, match="task does not match"):
        run(workspace(folder, "task.temperature=2.0"), until="train")
    with pytest.raises(MismatchError, match=r"data\.texts"):
        run(workspace(folder, 'task.templates=["a drawing of {}"]'), until="train")


@pytest.mark.slow
def test_without_texts_the_text_tower_stays_and_retrieval_is_left_out_with_the_reason(small):
    made = workspace(small)
    report = run_all(made)
    assert report["evaluation"]["rows"] == []
    assert "no text is trained on" in report["evaluation"]["protocol"][0]["left_out"][0]
    assert "no text is trained on" in made.report_html.read_text()
    lines = [row for row in read_metrics(made) if "loss" in row]
    assert {"feature_image", "class_distil", "class_labels"} <= set(lines[0])
    assert "feature_text" not in lines[0]


@pytest.mark.slow
def test_a_live_teacher_gives_the_same_classes(small):
    shutil.rmtree(small / "test" / "red_thing")  # its prompts are needed all the same
    made = workspace(small, 'train.mode="live"', "cache.views=2")
    report = run_all(made)
    assert [one["label"] for one in report["classification"]["classes"]] == sorted(tiny.COLOURS)
    assert report["classification"]["sets"][0]["pictures"] == 8


@pytest.mark.slow
def test_all_zero_losses_train_by_the_classes_alone_but_not_with_texts(small):
    zero = ["loss.feature_mse=0.0"]
    made = workspace(small, *zero, out="zero")
    run(made, until="train")
    assert set(read_metrics(made)[0]) >= {"class_distil", "class_labels"}
    with pytest.raises(ConfigError, match=r"set train\.batch = 0, train\.batch_texts = 0 and train\.batch_images = 12"):
        run(workspace(small, *zero, "train.batch=4", out="texts"), until="train")
    with pytest.raises(ConfigError, match=r"every weight is 0, task\.distil and task\.labels too"):
        run(workspace(small, *zero, "task.distil=0.0", "task.labels=0.0", out="none"), until="train")


@pytest.mark.slow
def test_unlabelled_pictures_take_part_and_without_a_val_set_the_last_student_is_kept(small, caplog):
    tiny.image_folder(small / "more", 5, start=40)
    text = (small / "run.toml").read_text().replace('val = "val"', 'images = "more"')
    (small / "run.toml").write_text(text)
    made = workspace(small)
    run(made, until="train")
    assert "the last step's student is kept" in caplog.text
    assert not [row for row in read_metrics(made) if "score" in row]
    assert load_data(made).images[0].label is None
    assert Classifier.load(made.student).head.scale > 1


def test_saving_the_classifier_takes_the_last_scale_where_nothing_was_scored(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from training import little

    from clipdistill.data.classes import classes_of
    from clipdistill.stages.classify import ClassTask
    from clipdistill.training.classes import ClassLabels, ClassLoss

    vectors = np.eye(2, little.TEACHER_DIM, dtype=np.float32)
    loss = ClassLoss(vectors, 40.0, temperature=1.0, distil=1.0, labels=1.0)
    task = ClassTask(classes_of(["a", "b"], ("{}",), {}), vectors, loss, ClassLabels({}))
    student = little.student()
    student.save(tmp_path / "student")
    config = SimpleNamespace(student=StudentConfig())
    place = SimpleNamespace(config=config, training=tmp_path / "training", student=tmp_path / "student")
    with torch.no_grad():
        loss.scale.logit_scale.fill_(np.log(33.0))
    save_classifier(place, task, student)
    assert Classifier.load(tmp_path / "student").head.scale == pytest.approx(33)
    (tmp_path / "training").mkdir()
    lines = [{"step": 1, "score": 0.2, "class_scale": 5.0}, {"step": 2, "score": 0.4, "class_scale": 6.0}]
    lines += [{"step": 3, "score": 0.4, "class_scale": 7.0}, {"step": 3, "loss": 1.0}]
    (tmp_path / "training/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    save_classifier(place, task, student)
    assert Classifier.load(tmp_path / "student").head.scale == 6.0


def test_names_and_prompts_are_the_captions_so_that_each_is_cached_once(small):
    made = workspace(small, 'task.names={red_thing="crimson"}')
    made.begin()
    data = load_data(made)
    assert data.classes.names == ("blue thing", "green thing", "crimson")
    red = [pair for pair in data.sets["train"].pairs if pair.label == "red_thing"]
    assert {pair.captions for pair in red} == {("a photo of a crimson.", "crimson")}
    cache, kept = open_cache(made, data, open_teachers(made.config))
    assert cache.facts["texts"] == 6
    assert kept.classes == data.classes


def refuse(folder, error, match, *overrides):
    made = workspace(folder, *overrides)
    made.begin()
    with pytest.raises(error, match=match):
        load_data(made)


def test_bad_classes_are_told(small):
    refuse(
        small,
        ConfigError,
        r"task\.names: no class 'red_thin' in data\.train; did you mean 'red_thing'",
        'task.names={red_thin="x"}',
    )
    refuse(small, DataError, r"data\.train: \d of 3 classes have no picture left.*held out", "data.fraction=0.1")
    (small / "test/red_thing").rename(small / "test/red_things")
    refuse(small, DataError, r"data\.test\.test: 1 of its classes are not in data\.train: 'red_things'.*did you mean")
    (small / "train/empty").mkdir()
    refuse(small, DataError, "1 of 4 class folders hold no picture: 'empty'")
    for name in ("empty", "red_thing", "green_thing"):
        shutil.rmtree(small / "train" / name)
    refuse(small, ConfigError, "the one class 'blue_thing' is there")


def test_a_class_that_loses_its_last_picture_in_the_cache_is_named(small):
    for number in range(1, 8):
        (small / f"train/red_thing/p{number:03d}.png").unlink()
    last = small / "train/red_thing/p000.png"
    last.write_bytes(last.read_bytes()[:-40])  # the header is whole: it breaks only when it is decoded
    made = workspace(small, "data.max_rejected=5.0")
    made.begin()
    data = load_data(made)
    assert len(data.sets["train"]) == 17
    with pytest.raises(DataError, match="1 of 3 classes have no picture left to train on: 'red_thing'"):
        open_cache(made, data, open_teachers(made.config))


def test_rows_without_a_label_are_refused_and_counted(small):
    shutil.copy(small / "train/red_thing/p000.png", small / "train/stray.png")
    refuse(small, DataError, r"1 of 46 rows were refused")
    assert "no label" in (small / "out/rejected.jsonl").read_text()


@pytest.mark.slow
def test_several_teachers_classify_as_one_and_agree_with_their_own_mean(small):
    tiny.teacher_folder(small / "second", seed=4, siglip=True)
    members = '[teacher]\nmembers = [{model = "local-dir:teacher"}, {model = "local-dir:second"}]\n'
    text = (small / "run.toml").read_text()
    (small / "run.toml").write_text(text.replace('[teacher]\nmodel = "local-dir:teacher"\nbatch = 8\n', members))
    made = workspace(small, 'student.text_init="random"', 'task.templates=["{}"]')
    measured = run_all(made)["classification"]["sets"][0]
    logits = 0.0
    pairs = load_data(made).sets["test"].pairs
    for teacher in open_teachers(made.config):
        texts = teacher.encode_texts(["blue thing", "green thing", "red thing"])
        images = teacher.encode_images([pair.picture for pair in pairs])
        logits = logits + teacher.scale * images @ texts.T
    truth = [sorted(tiny.COLOURS).index(pair.label) for pair in pairs]
    assert measured["teacher"]["top1"]["value"] == pytest.approx(np.mean(logits.argmax(axis=1) == truth))
    powers = np.exp(logits / 2 - (logits / 2).max(axis=1, keepdims=True))
    sure = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1)
    bins = measured["teacher"]["bins"]
    assert sum(one["pictures"] * (one["confidence"] or 0) for one in bins) / 12 == pytest.approx(sure.mean(), abs=2e-3)
