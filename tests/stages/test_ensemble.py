import json
import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from clipdistill.cache import EnsembleCache
from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.evaluation import RetrievalReport
from clipdistill.losses.batch import Embeddings, Targets
from clipdistill.losses.objective import LossWeights, Objective
from clipdistill.report.lines import inspection_lines
from clipdistill.report.members import member_tables
from clipdistill.report.tables import result_tables
from clipdistill.stages.inputs import load_data, name_checks, open_cache
from clipdistill.stages.inspect import inspect
from clipdistill.stages.run import run
from clipdistill.stages.teachers import first_teacher, open_teachers, whole_teacher
from clipdistill.stages.train import new_student, teacher_scale
from clipdistill.stages.workspace import Workspace

TWO = '{model = "local-dir:teacher", weight = 2}, {model = "local-dir:small"}'


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """The tiny run with its pictures, and three teachers: two of one width, and a narrower one."""
    folder = tmp_path_factory.mktemp("ground")
    tiny.run_toml(folder)
    tiny.teacher_folder(folder / "small", seed=1, dim=16)
    tiny.teacher_folder(folder / "alike", seed=2)
    return folder


@pytest.fixture
def place(ground, tmp_path):
    for part in ("train", "val", "test"):
        shutil.copytree(ground / part, tmp_path / part)
    for part in ("teacher", "small", "alike"):
        (tmp_path / part).symlink_to(ground / part)
    shutil.copy(ground / "run.toml", tmp_path / "base.toml")
    return tmp_path


def workspace(folder, members, *more, out="out"):
    """The tiny run with these members in the place of its teacher."""
    text = (folder / "base.toml").read_text().replace('model = "local-dir:teacher"', f"members = [{members}]")
    (folder / "run.toml").write_text(text)
    made = Workspace(RunConfig.load(folder / "run.toml", more, checks=[name_checks]), folder / out)
    made.begin()
    return made


def opened(made):
    return open_cache(made, load_data(made), open_teachers(made.config))


def embeddings(folder, pairs, dim=12):
    """Embeddings of the pairs that some other tool made."""
    rng = np.random.default_rng(8)
    for part in ("img_emb", "text_emb"):
        (folder / part).mkdir(parents=True)
        np.save(folder / part / f"{part}_0.npy", rng.standard_normal((len(pairs), dim)).astype(np.float16))
    (folder / "metadata").mkdir()
    table = {"key": [pair.key for pair in pairs], "caption": [pair.captions[0] for pair in pairs]}
    pq.write_table(pa.table(table), folder / "metadata/metadata_0.parquet")


def test_each_member_has_a_cache_of_its_own_that_serves_alone(place):
    made = workspace(place, TWO, "cache.folder=shared")
    cache, data = opened(made)
    assert isinstance(cache, EnsembleCache)
    assert (cache.dim, cache.widest) == (40, 24)
    assert {path.parent.name for path in (place / "shared").rglob("manifest.json")} == {"teacher", "small"}
    again, _ = opened(made)
    assert again.fingerprint == cache.fingerprint
    (place / "run.toml").write_text((place / "base.toml").read_text())
    alone = Workspace(RunConfig.load(place / "run.toml", ["cache.folder=shared/teacher"]), place / "alone")
    one, _ = open_cache(alone, data, open_teachers(alone.config))
    assert one.fingerprint == cache.members[0].cache.fingerprint


def test_a_tampered_member_and_another_teacher_name_the_member(place):
    made = workspace(place, TWO)
    opened(made)
    rows = made.folder / "cache/small/img_emb/img_emb_0.npy"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(MismatchError, match=r"^teacher\.members\.1 \(small\): .*img_emb_0\.npy: sha256"):
        opened(made)
    rows.write_bytes(whole)
    swapped = workspace(place, TWO.replace("local-dir:small", "local-dir:alike").replace("}", ', cache = "c"}', 1))
    (made.folder / "cache/small").rename(made.folder / "cache/alike")
    with pytest.raises(MismatchError, match=r"^teacher\.members\.1 \(alike\): .*teacher\.weights does not match"):
        opened(swapped)


def test_two_members_in_one_folder_are_refused_however_it_is_written(place):
    made = workspace(place, TWO.replace("}", f', cache = "{place}/c"}}', 1).replace('small"}', 'small", cache = "c"}'))
    assert {made.cache_of(member) for member in made.config.teacher.members} == {place / "c"}
    with pytest.raises(
        ConfigError, match=r"^teacher\.members\.1\.cache: .* \(small\) would store its embeddings in .*/c, "
    ):
        opened(made)
    inside = workspace(place, TWO.replace('small"}', 'small", cache = "out/cache/teacher/x"}'))
    with pytest.raises(ConfigError, match=r"cache/teacher/x, and teacher\.members\.0"):
        opened(inside)
    assert not (place / "c").exists()
    assert not (place / "out/cache").exists()


def test_caches_that_were_filled_before_make_an_ensemble_without_their_teachers(place):
    whole, _ = opened(workspace(place, TWO, "cache.views=2"))
    stored = '{embeddings = "out/cache/teacher", weight = 2}, {embeddings = "out/cache/small"}'
    made = workspace(place, stored, "cache.views=2", out="again")
    assert open_teachers(made.config) == (None, None)
    cache, _ = opened(made)
    assert cache.fingerprint == whole.fingerprint
    assert (cache.views, cache.scale) == (2, whole.scale)
    with pytest.raises(MismatchError, match=r"^teacher\.members\.0 .*views\.count does not match: expected 3, found 2"):
        opened(workspace(place, stored, "cache.views=3", out="again"))
    scaled = stored.replace("weight = 2", "logit_scale = 100.0")
    with pytest.raises(MismatchError, match=r"members\.0\.logit_scale does not match: expected 100\.0, found 14\.28"):
        opened(workspace(place, scaled, "cache.views=2", out="again"))
    rows = place / "out/cache/small/text_emb/text_emb_0.npy"
    rows.write_bytes(rows.read_bytes()[:-1] + b"x")
    with pytest.raises(MismatchError, match=r"^teacher\.members\.1 \(small\): .*text_emb_0\.npy: sha256"):
        opened(made)


def test_a_cache_that_was_filled_before_serves_alone_without_its_teacher(place):
    whole, _ = opened(workspace(place, TWO))
    text = (place / "base.toml").read_text().replace('model = "local-dir:teacher"', 'embeddings = "out/cache/small"')
    (place / "run.toml").write_text(text)
    made = Workspace(RunConfig.load(place / "run.toml"), place / "alone")
    cache, _ = opened(made)
    assert cache.fingerprint == whole.members[1].cache.fingerprint
    views = Workspace(RunConfig.load(place / "run.toml", ["cache.views=2"]), place / "alone")
    with pytest.raises(MismatchError, match=r"cache\.views does not match: expected 2, found 1.*set cache\.views = 1"):
        opened(views)


def test_more_views_than_adopted_embeddings_have_are_refused_before_anything_is_embedded(place):
    data = load_data(workspace(place, TWO))
    embeddings(place / "stored", data.pairs)
    made = workspace(place, '{model = "local-dir:teacher"}, {embeddings = "stored", logit_scale = 9}', "cache.views=2")
    with pytest.raises(
        MismatchError, match=r"^teacher\.members\.1 \(stored\): .*cache\.views .*: set cache\.views = 1"
    ):
        opened(made)
    assert not (made.folder / "cache").exists()


def test_embeddings_of_other_widths_are_refused_before_anything_is_embedded(place):
    made = workspace(place, TWO, "teacher.combine=embeddings")
    with pytest.raises(ConfigError, match=r"members\.0 \(teacher\) has 24, teacher\.members\.1 \(small\) has 16"):
        opened(made)
    data = load_data(made)
    embeddings(place / "stored", data.pairs)
    made = workspace(
        place,
        TWO.replace('model = "local-dir:small"', 'embeddings = "stored", logit_scale = 9'),
        "teacher.combine=embeddings",
    )
    with pytest.raises(ConfigError, match=r"members\.0 \(teacher\) has 24, teacher\.members\.1 \(stored\) has 12"):
        opened(made)
    assert not (made.folder / "cache").exists()


def test_averaging_models_of_different_spaces_is_warned_of(place, caplog):
    alike = '{model = "local-dir:teacher"}, {model = "local-dir:alike"}'
    made = workspace(place, alike, "teacher.combine=embeddings")
    with caplog.at_level(logging.WARNING, "clipdistill"):
        cache, _ = opened(made)
    assert cache.dim == 24
    assert "seem to be of different spaces" in caplog.text


def test_the_student_takes_the_widest_members_width_and_the_first_token_table(place):
    made = workspace(place, '{model = "local-dir:small"}, {model = "local-dir:teacher"}')
    teachers = open_teachers(made.config)
    assert first_teacher(teachers) is teachers[0]
    assert first_teacher((None, teachers[1])) is teachers[1]
    assert first_teacher((None, None)) is None
    whole = whole_teacher(made.config, teachers)
    cache, data = open_cache(made, load_data(made), teachers)
    assert (whole.dim, whole.scale) == (cache.dim, pytest.approx(cache.scale, rel=1e-6))
    pictures = [pair.picture for pair in data.pairs[:3]]
    stored = cache.image_rows([pair.key for pair in data.pairs[:3]])
    assert (whole.encode_images(pictures) * stored).sum(axis=1).min() > 0.99999
    assert whole_teacher(made.config, (teachers[0], None)) is None
    student = new_student(made.config, data, cache, first_teacher(teachers))
    assert student.dim == 24
    assert student.to_teacher_vectors(student.encode_texts(["a red cat"]), "text").shape == (1, 40)


def test_a_picture_that_breaks_is_reported_once_and_embeddings_need_not_have_it(place):
    made = workspace(place, f'{TWO}, {{embeddings = "stored", logit_scale = 50}}'.replace('"stored"', '"train"'))
    data = load_data(made)
    broken = next(pair for pair in data.pairs if "p003" in pair.key)
    embeddings(place / "stored", [pair for pair in data.pairs if pair.key != broken.key])
    path = place / "train/p003.png"
    path.write_bytes(path.read_bytes()[:200])
    made = workspace(place, f'{TWO}, {{embeddings = "stored", logit_scale = 50}}', "data.max_rejected=2.0", out="again")
    cache, kept = opened(made)
    assert cache.dim == 52
    assert len(kept.sets["train"]) == 23
    rows = [json.loads(line) for line in made.rejected.read_text().splitlines()]
    assert [row["key"] for row in rows] == [broken.key]


def softmax(logits):
    rows = np.exp(logits - logits.max(axis=1, keepdims=True))
    return rows / rows.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_the_affinity_loss_gets_the_mean_before_or_after_the_softmax(place, form):
    cache, data = opened(workspace(place, TWO, f"teacher.combine={form}"))
    pairs = data.sets["val"].pairs
    keys, texts = [pair.key for pair in pairs], [pair.captions[0] for pair in pairs]
    drawn = np.random.default_rng(1).standard_normal((2, len(pairs), 24))
    images, words = drawn / np.linalg.norm(drawn, axis=2, keepdims=True)
    logits = [
        m.cache.scale * m.cache.image_rows(keys) @ m.cache.text_rows(texts).T.astype(float) for m in cache.members
    ]
    wanted = 0
    for side in (lambda rows: rows, np.transpose):
        if form == "logits":
            target = softmax(side(2 / 3 * logits[0] + 1 / 3 * logits[1]))
        else:
            target = 2 / 3 * softmax(side(logits[0])) + 1 / 3 * softmax(side(logits[1]))
        found = softmax(side(20 * images @ words.T))
        wanted += (target * np.log(target / found)).sum(axis=1).mean() / 2
    objective = Objective(LossWeights(affinity=1.0, student_scale=20.0), teacher_scale(cache))
    own = Embeddings(torch.from_numpy(images), torch.from_numpy(words))
    wide = Embeddings(*(torch.zeros(len(pairs), 40, dtype=torch.float64) for _ in range(2)))
    rows = Embeddings(torch.from_numpy(cache.image_rows(keys)), torch.from_numpy(cache.text_rows(texts)))
    targets = Targets(rows, torch.eye(len(pairs)).bool(), len(pairs))
    assert float(objective(own, wide, targets).total) == pytest.approx(wanted, rel=1e-4)
    assert len(teacher_scale(cache).members) == (2 if form == "probabilities" else 0)


@pytest.mark.slow
def test_a_run_of_a_model_and_embeddings_from_end_to_end(place):
    made = workspace(place, TWO)
    embeddings(place / "stored", load_data(made).pairs)
    stored = '{model = "local-dir:teacher", weight = 2, scale = 30}, {embeddings = "stored", logit_scale = 60}'
    made = workspace(place, stored, "report.strips=1", out="run")
    report = run(made)
    assert report["sizes"]["teacher"] == {"name": "teacher + stored", "dim": 36}
    assert [(m["name"], m["dim"], m["scale"]) for m in report["members"]] == [
        ("teacher", 24, 30.0),
        ("stored", 12, 60.0),
    ]
    assert [member["weight"] for member in report["members"]] == pytest.approx([2 / 3, 1 / 3])
    cache, data = opened(made)
    pairs = data.sets["test"].pairs
    keys, texts = [pair.key for pair in pairs], [pair.captions[0] for pair in pairs]
    for member, told in zip(cache.members, report["members"], strict=True):
        scores = member.cache.text_rows(texts) @ member.cache.image_rows(keys).T
        wanted = np.mean(scores.argmax(axis=1) == np.arange(len(pairs)))
        row = next(r for r in told["rows"] if (r["measure"], r["k"], r["direction"]) == ("success", 1, "text_to_image"))
        assert row["value"] == pytest.approx(wanted)
        assert row["pairing"] == "member"
    assert "parameters" not in report["members"][0], "the ensemble's whole size is not known"
    tables = member_tables(report, result_tables(RetrievalReport.from_json(report["evaluation"])))
    assert [line.name for line in tables[0].lines] == ["all together", "teacher", "stored"]
    page = made.report_html.read_text()
    assert "The teachers" in page
    assert tables[0].finding.split("“")[0] in page
    assert run(made) == report
    other = workspace(place, stored.replace("weight = 2", "weight = 3"), "report.strips=1", out="run")
    with pytest.raises(MismatchError, match="teacher cache does not match"):
        run(other)


@pytest.mark.slow
def test_a_live_run_of_two_teachers_stores_what_is_measured(place):
    live = ("train.mode=live", "cache.views=2", "teacher.combine=probabilities")
    report = run(workspace(place, TWO, *live))
    assert report["sizes"]["teacher"]["parameters"] == sum(member["parameters"] for member in report["members"])
    assert report["speeds"]["teacher"]["images_per_s"] > 0
    cache, _ = opened(workspace(place, TWO, *live))
    assert [member.cache.facts["pictures"] for member in cache.members] == [18, 18]
    assert run(workspace(place, TWO, *live)) == report
    with pytest.raises(MismatchError, match="teacher cache does not match"):
        run(workspace(place, TWO, "train.mode=live", "cache.views=2"))


def test_a_live_run_takes_members_whose_stored_views_differ(place):
    members = TWO.replace("}", ', cache = "whole"}', 1)
    opened(workspace(place, members.replace("small", "alike"), "cache.views=2"))
    cache, _ = opened(workspace(place, members, "train.mode=live", out="live"))
    assert [member.cache.views for member in cache.members] == [2, 1]
    assert cache.views == 1


def test_an_inspection_adds_up_the_members(place):
    made = workspace(place, f'{TWO}, {{embeddings = "train", logit_scale = 50}}', "cache.dtype=float32")
    found = inspect(made, load_data(made))
    cost = found["cost"]
    assert (cost["picture_passes"], cost["text_passes"]) == (84, 84)
    assert cost["cache_bytes"] == 4 * (24 + 16) * (42 + 42)
    assert cost["teacher_parameters"] == sum(part.get("teacher_parameters", 0) for part in cost["members"])
    assert cost["estimated_seconds"] == pytest.approx(sum(c.get("estimated_seconds", 0) for c in cost["members"]))
    lines = list(inspection_lines(found, made.rejected))
    assert any(line.startswith("  teacher: teacher, ") for line in lines)
    assert any(line.startswith("  teacher: small, ") for line in lines)
    assert any(line.startswith("  all 3 teachers: ") for line in lines)
    assert any("adopted from" in line for line in lines)


def test_a_members_name_is_checked_under_its_own_place(place):
    with pytest.raises(ConfigError) as caught:
        workspace(place, '{model = "ViT-B-23"}, {model = "ViT-B-32", pretrained = "opnai"}, {model = "local-dir:no"}')
    text = "\n".join(caught.value.faults)
    assert "teacher.members.0.model: unknown model 'ViT-B-23'" in text
    assert (
        "teacher.members.1.pretrained: 'opnai' is neither a file nor a tag of ViT-B-32; did you mean 'openai'?" in text
    )
    assert "teacher.members.2.model: no such file or folder: no" in text
