"""A whole run of a text tower alone: with a live teacher, and with no more than the embeddings of one."""

import io
import json

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from rich.console import Console

from clipdistill.cache import TeacherCache
from clipdistill.config import RunConfig
from clipdistill.core import files
from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Picture
from clipdistill.report.terminal import summary
from clipdistill.retrieval.exact import exact_top_k
from clipdistill.retrieval.index import VectorIndex
from clipdistill.retrieval.measures import overlap_at_k
from clipdistill.search import QuerySide, Searcher
from clipdistill.stages import train as train_stage
from clipdistill.stages.index import search
from clipdistill.stages.inputs import load_data, name_checks, open_cache
from clipdistill.stages.run import run, run_all
from clipdistill.stages.teachers import open_teachers
from clipdistill.stages.workspace import Workspace
from clipdistill.sweep.trial import _measured
from clipdistill.towers.student import DualEncoder

PICTURE_TOWER = 'image = "mobilenetv4_conv_small_050"\nimage_size = 32\nimage_init = "random"\n'
EMBEDDINGS = 'embeddings = "embeddings"\nlogit_scale = 100.0'


def query_side(folder):
    """A small run's configuration with the teacher's own picture tower."""
    path = tiny.run_toml(folder)
    text = path.read_text()
    assert PICTURE_TOWER in text
    path.write_text(text.replace(PICTURE_TOWER, 'image = "teacher"\n'))
    return path


def workspace_of(path, *overrides, out="out"):
    return Workspace.of(RunConfig.load(path, overrides, checks=[name_checks]), path.parent / out)


def adopted(folder):
    """The same with no teacher but its embeddings, in clip-retrieval's layout."""
    path, rng = query_side(folder), np.random.default_rng(0)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / "embeddings" / name).mkdir(parents=True)
        if name != "metadata":
            np.save(folder / f"embeddings/{name}/{name}_0.npy", rng.normal(size=(42, 20)).astype(np.float16))
    table = {"image_path": [f"p{n:03d}.png" for n in range(42)], "caption": [tiny.caption(n) for n in range(42)]}
    pq.write_table(pa.table(table), folder / "embeddings/metadata/metadata_0.parquet")
    path.write_text(path.read_text().replace('model = "local-dir:teacher"', EMBEDDINGS))
    return path


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A finished run with a live teacher, and its report; the training read no picture."""
    workspace = workspace_of(query_side(tmp_path_factory.mktemp("live")), "train.batch_texts=4")
    run(workspace, until="cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Picture, "read", lambda self: pytest.fail(f"{self.origin} was read"))
        data = load_data(workspace)
        cache = TeacherCache.open(workspace.cache)
        train_stage.train(workspace, data, cache, open_teachers(workspace.config))
    return workspace, run_all(workspace)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A finished run with a teacher's embeddings alone, and its report."""
    workspace = workspace_of(adopted(tmp_path_factory.mktemp("stored")), "student.text_init=random", "student.dim=12")
    return workspace, run_all(workspace)


def value(report, measure, pairing, direction="text_to_image", search="exact"):
    rows = [
        row
        for row in report["evaluation"]["rows"]
        if (row["measure"], row["pairing"], row["direction"], row["k"]) == (measure, pairing, direction, 10)
        and row["search"].startswith(search)
    ]
    assert len(rows) == 1
    return rows[0]["value"]


def test_the_student_is_measured_against_the_teachers_vectors(live):
    workspace, report = live
    pairings = {(row["direction"], row["pairing"]) for row in report["evaluation"]["rows"]}
    assert pairings == {
        ("text_to_image", "teacher"),
        ("text_to_image", "student_query_teacher_index"),
        ("image_to_text", "teacher"),
        ("image_to_text", "teacher_query_student_index"),
    }
    student, cache = DualEncoder.load(workspace.student), TeacherCache.open(workspace.cache)
    source = load_data(workspace).sets["test"]
    texts = [text for pair in source.pairs for text in pair.captions]
    pictures = cache.image_rows([pair.key for pair in source.pairs])
    own, theirs = (
        exact_top_k(rows, pictures, 10).ids for rows in (student.encode_texts(texts), cache.text_rows(texts))
    )
    assert value(report, "overlap", "student_query_teacher_index") == pytest.approx(
        overlap_at_k(own, theirs, 10).mean()
    )
    left_out = report["evaluation"]["protocol"][0]["left_out"]
    assert left_out == ["student: the student has no picture tower: pictures are the teacher's"]


def test_the_score_is_the_overlap_with_the_teachers_pictures(live):
    workspace, _ = live
    lines = [json.loads(line) for line in (workspace.training / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "score" in line]
    assert scored
    assert all(line["score"] == line["overlap10_text_to_image"] for line in scored)
    assert not any("image_to_text" in name for line in lines for name in line)


def test_the_index_holds_the_teachers_own_rows(live):
    workspace, _ = live
    student, cache = DualEncoder.load(workspace.student), TeacherCache.open(workspace.cache)
    assert student.searches.fingerprint == cache.facts["teacher"]["fingerprint"]
    index = VectorIndex.load(workspace.index, encoder=student.searches.fingerprint)
    keys = [pair.key for pair in load_data(workspace).pairs]
    found = index.search(cache.image_rows(keys), 1)
    assert [names[0] for names in index.keys(found)] == keys
    assert np.abs(found.scores - 1).max() < 1e-6
    hits = search(workspace, "a red bicycle", 3)
    wanted = exact_top_k(student.encode_texts(["a red bicycle"]), cache.image_rows(keys), 3)
    assert [hit.key for hit in hits] == [keys[row] for row in wanted.ids[0]]


def test_a_picture_is_asked_with_the_teacher(live):
    workspace, _ = live
    hits = search(workspace, str(workspace.folder.parent / "train/p005.png"), 1)
    assert hits[0].key.endswith("p005.png")
    assert hits[0].score == pytest.approx(1, abs=1e-5)


def test_an_index_that_was_there_before_is_searched_as_it_lies(live, tmp_path):
    workspace, _ = live
    teacher = open_teachers(workspace.config)[0]
    pairs = tiny.pairs(6)
    vectors = teacher.encode_images([pair.picture for pair in pairs])
    VectorIndex.build(vectors, [pair.key for pair in pairs], encoder=teacher.fingerprint).save(tmp_path / "old")
    student = DualEncoder.load(workspace.student)
    searcher = Searcher(QuerySide(student), VectorIndex.load(tmp_path / "old", encoder=student.searches.fingerprint))
    wanted = exact_top_k(student.encode_texts(["a cat"]), vectors, 6).ids[0]
    assert [hit.key for hit in searcher.by_text("a cat", 6)] == [pairs[row].key for row in wanted]


def test_another_teachers_index_and_another_teacher_are_refused(live, tmp_path):
    workspace, _ = live
    student = DualEncoder.load(workspace.student)
    mine = student.searches.fingerprint
    index = VectorIndex.load(workspace.index, encoder=mine)
    other = workspace_of(query_side(tmp_path), f"teacher.model=local-dir:{tiny.teacher_folder(tmp_path / 'o', seed=9)}")
    stranger = open_teachers(other.config)[0]
    rows = stranger.encode_images([pair.picture for pair in tiny.pairs(6)])
    VectorIndex.build(rows, [str(n) for n in range(6)], encoder=stranger.fingerprint).save(tmp_path / "index")
    both = f"expected {mine}, found {stranger.fingerprint}"
    with pytest.raises(MismatchError, match=both):
        VectorIndex.load(tmp_path / "index", encoder=mine)
    with pytest.raises(MismatchError, match=both):
        Searcher(QuerySide(student), VectorIndex.load(tmp_path / "index", encoder=None))
    with pytest.raises(MismatchError, match=both):
        QuerySide(student, stranger)
    moved = Workspace(workspace.config, tmp_path / "moved")
    student.save(moved.student)
    VectorIndex.load(tmp_path / "index", encoder=None).save(moved.index)
    with pytest.raises(MismatchError, match=both):
        search(moved, "a cat", 2)
    index.save(tmp_path / "moved/index")
    assert len(search(moved, "a cat", 2)) == 2
    with pytest.raises(MismatchError, match="fingerprint"):  # the picture would be embedded by the wrong teacher
        search(Workspace(other.config, moved.folder), str(tmp_path / "train/p001.png"), 2)


def test_open_clip_loads_the_combined_model(live):
    workspace, _ = live
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{workspace.combined}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{workspace.combined}")
    teacher, student = open_teachers(workspace.config)[0], DualEncoder.load(workspace.student)
    pictures = [pair.picture for pair in tiny.pairs(3)]
    from clipdistill.data.pictures import decode

    with torch.no_grad():
        pixels = torch.stack([transform(decode(picture.read(), 10**6, "x")) for picture in pictures])
        images = model.eval().encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(tokenizer(["a cat", "a red boat"]), normalize=True).numpy()
    assert np.array_equal(images, teacher.encode_images(pictures))
    assert np.abs(texts - student.encode_texts(["a cat", "a red boat"])).max() < 1e-5


def test_the_report_says_what_is_saved(live):
    workspace, report = live
    teacher, student = open_teachers(workspace.config)[0], DualEncoder.load(workspace.student)
    saves = report["saves"]
    assert saves["pictures_not_embedded_again"] == 42
    assert saves["seconds_not_spent"] == pytest.approx(42 / report["speeds"]["teacher"]["images_per_s"])
    visual = sum(value.numel() for value in teacher.model.visual.parameters())
    assert saves["picture_parameters_not_loaded"] == visual
    assert saves["text_tower"]["teacher"]["parameters"] == teacher.parameters - visual
    assert saves["text_tower"]["student"]["parameters"] == student.parameters
    assert report["speeds"]["student"]["images_per_s"] is None
    page = workspace.report_html.read_text()
    assert "42 pictures are not embedded again" in page
    assert "What it saves" in page
    assert "student&#39;s queries, teacher&#39;s vectors" in page
    console = Console(file=io.StringIO(), width=100)
    for item in summary(report):
        console.print(item)
    text = console.file.getvalue()
    assert "42 pictures are not embedded again" in text
    assert "of the teacher's success@10" in text
    assert "student on teacher" in text and "teacher on student" in text


def test_a_sweeps_trial_takes_the_queries_on_the_teachers_vectors(live):
    _, report = live
    found = _measured(report)["test"]
    for measure in ("overlap", "retention", "success"):
        assert found[f"{measure}10"] == value(report, measure, "student_query_teacher_index")


def test_run_again_keeps_all_and_a_new_student_keeps_the_index(live):
    workspace, _ = live
    before = {path: path.stat().st_mtime_ns for path in workspace.index.iterdir()}
    run_all(workspace)
    assert {path: path.stat().st_mtime_ns for path in workspace.index.iterdir()} == before
    with pytest.raises(MismatchError, match="train"):
        run(Workspace(workspace.config.model_copy(update={"seed": 4}), workspace.folder), until="train")


def test_stored_embeddings_are_enough(stored):
    workspace, report = stored
    student = DualEncoder.load(workspace.student)
    assert (student.dim, student.teacher_dim) == (12, 20)
    assert report["sizes"]["teacher"]["dim"] == 20
    assert report["saves"]["pictures_not_embedded_again"] == 42
    assert report["saves"]["seconds_not_spent"] is None
    assert report["saves"]["texts_per_s_ratio"] is None
    assert not workspace.combined.exists()
    data = load_data(workspace)
    cache, _ = open_cache(workspace, data, (None,))
    keys = [pair.key for pair in data.pairs]
    rows = student.to_teacher_vectors(student.encode_texts(["a red cat"]), "text")
    wanted = exact_top_k(rows, cache.image_rows(keys), 4).ids[0]
    assert [hit.key for hit in search(workspace, "a red cat", 4)] == [keys[row] for row in wanted]
    assert "42 pictures are not embedded again" in workspace.report_html.read_text()
    assert value(report, "overlap", "student_query_teacher_index", search="index:") >= 0


def test_a_picture_cannot_be_asked_without_the_teacher(stored):
    workspace, _ = stored
    with pytest.raises(DataError, match="pictures are embedded by the teacher embeddings, which is not at hand"):
        search(workspace, str(workspace.folder.parent / "train/p005.png"), 1)


def test_what_does_not_go_with_it_is_told_at_once(tmp_path):
    path = query_side(tmp_path)
    faults = [
        "student.image_init=random", "student.image_size=32", "train.batch_images=4", "train.mode=live",
        "train.lr_image=0.1", "train.lr_head=0.1", "student.dims=[24,12]", "task.kind=classification",
        "student.text=inherit",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        RunConfig.load(path, faults, checks=[name_checks])
    for fault in faults:
        assert fault.partition("=")[0] + ": " in str(raised.value), fault
    assert str(raised.value).count('does not go with student.image = "teacher"') == len(faults)
    files.write_text(tmp_path / "again.toml", RunConfig.load(path).to_toml())
    assert RunConfig.load(tmp_path / "again.toml").student.image == "teacher"
