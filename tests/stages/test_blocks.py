import json

import numpy as np
import pytest
import tiny

from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.report.lines import inspection_lines
from clipdistill.stages.blocks import check_blocks
from clipdistill.stages.inputs import load_data
from clipdistill.stages.inspect import inspect
from clipdistill.stages.run import run
from clipdistill.stages.teachers import first_teacher, open_teachers
from clipdistill.stages.workspace import Workspace

FEATURES = """
[features]
image = [{student = 0.5, teacher = 1.0}, {student = "trunk.blocks.3", teacher = "transformer.resblocks.0"}]
text = [{student = 1.0, teacher = 0.5}]
"""


@pytest.fixture
def path(tmp_path):
    path = tiny.run_toml(tmp_path)
    path.write_text(path.read_text() + FEATURES)
    return path


def opened(path, *overrides, out="out"):
    made = Workspace(RunConfig.load(path, overrides), path.parent / out)
    made.begin()
    return made


def metrics(workspace):
    lines = (workspace.training / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_blocks_train_from_the_store_and_from_the_live_teacher_alike(path):
    stored = opened(path, 'features.pool="grid"', "features.cells=2")
    run(stored, until="train")
    (folder,) = (stored.cache / "blocks").glob("*-*")
    assert json.loads((folder / "manifest.json").read_text())["cells"] == 2
    assert not (folder / "plan.json").exists()
    assert np.load(folder / "image_0/view0_0.npy").shape == (16, 4, 32)
    live = opened(path, 'features.pool="grid"', "features.cells=2", 'features.store="live"', out="live")
    run(live, until="train")
    assert not (live.cache / "blocks").exists()
    for name in ("loss", "blocks_image", "blocks_text", "grad_norm"):  # later steps amplify float16's rounding
        assert metrics(stored)[0][name] == pytest.approx(metrics(live)[0][name], rel=3e-4), name
    for workspace in (stored, live):
        first, last = metrics(workspace)[0], metrics(workspace)[-1]
        assert 0 < last["blocks_text"] < 0.95 * first["blocks_text"]


def test_the_store_is_used_again_and_serves_less_data(path):
    run(opened(path), until="train")
    (folder,) = (opened(path).cache / "blocks").glob("*-*")
    before = (folder / "manifest.json").stat().st_mtime_ns
    shared = f'cache.folder="{opened(path).cache}"'
    run(opened(path, shared, "data.fraction=0.6", out="less"), until="train")
    assert list(folder.parent.glob("*-*")) == [folder]
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    run(opened(path, shared, 'features.pool="grid"', out="more"), until="train")
    assert len(list(folder.parent.glob("*-*"))) == 2


def test_other_blocks_are_another_training(path):
    run(opened(path), until="train")
    with pytest.raises(MismatchError, match="features does not match"):
        run(opened(path, "features.weight=2.0"), until="train")


def test_names_that_do_not_exist_are_all_told_before_the_teacher_runs(path):
    workspace = opened(
        path,
        'features.image=[{student="trunk.block.3", teacher="transformer.resblock.0"}]',
        'features.text=[{student="transformer.resblocks.7", teacher=0.5}]',
    )
    with pytest.raises(ConfigError) as caught:
        run(workspace, until="train")
    faults = caught.value.faults
    assert len(faults) == 3
    assert "features.image.0.teacher: the image tower has no module 'transformer.resblock.0'" in faults[0]
    assert "did you mean 'transformer.resblocks.0'?" in faults[0]
    assert "features.image.0.student" in faults[1]
    assert "trunk.blocks.3" in faults[1]
    assert "its blocks are transformer.resblocks.0 to transformer.resblocks.1" in faults[2]
    assert not workspace.cache.exists()


def test_the_cost_preview_says_whether_the_blocks_are_stored(path):
    workspace = opened(path)
    found = inspect(workspace, load_data(workspace))
    size = 2 * (24 * 32 + 24 * 32)  # two blocks of the student share one of the teacher
    told = found["cost"]["blocks"]
    assert told["estimated_seconds"] == pytest.approx(
        24 / found["cost"]["pictures_per_s"] + 24 / found["cost"]["texts_per_s"]
    )
    assert (told["blocks"], told["bytes"], told["store"], told["max_bytes"]) == (2, size, "cache", 2_000_000_000)
    assert "  inner blocks: 2 of the teacher's, 0.0 MB: stored" in "\n".join(
        inspection_lines(found, workspace.rejected)
    )
    tight = opened(path, "features.max_bytes=100")
    lines = "\n".join(inspection_lines(inspect(tight, load_data(tight)), tight.rejected))
    assert "more than features.max_bytes (0.0 MB): the teacher runs on each batch" in lines


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("features.weight=0.0", "features.weight: 0"),
        ('student.image="teacher"', "features.image: student.image"),
        ("features.text=[{student=1.5, teacher=0.5}]", "features.text.0"),
    ],
)
def test_faults_of_the_configuration(path, change, fault):
    with pytest.raises(ConfigError, match=fault):
        RunConfig.load(path, [change])


def test_adopted_embeddings_and_ensembles_have_no_blocks(path):
    text = path.read_text()
    adopted = 'embeddings = "train"\nlogit_scale = 50.0'
    path.write_text(text.replace('model = "local-dir:teacher"', adopted))
    with pytest.raises(ConfigError, match=r"features\.image: blocks are taken from a teacher that runs"):
        RunConfig.load(path)
    members = 'members = [{model = "local-dir:teacher"}, {embeddings = "train", logit_scale = 50.0}]'
    path.write_text(text.replace('model = "local-dir:teacher"', members))
    with pytest.raises(ConfigError, match=r"features\.text: blocks are one network's"):
        RunConfig.load(path)


def test_a_stored_cache_of_blocks_does_not_go_with_a_live_teacher(path):
    with pytest.raises(ConfigError, match=r'features\.store: "cache" does not go with train\.mode = "live"'):
        RunConfig.load(path, ['features.store="cache"', 'train.mode="live"'])


def test_nothing_is_checked_where_no_blocks_are_asked_for(path):
    path.write_text(path.read_text().replace(FEATURES, ""))
    workspace = opened(path)
    check_blocks(workspace.config, first_teacher(open_teachers(workspace.config)))


def test_blocks_go_with_a_live_teacher_masked_pictures_and_parts(path):
    """The masked pictures are passes of their own through the student, and each part is one through the teacher."""
    changes = ('train.mode="live"', "loss.masked_feature=1.0", "train.accumulation=2", "cache.views=2")
    workspace = opened(path, *changes)
    run(workspace, until="train")
    told = metrics(workspace)
    assert len(told) == 4
    assert all(0 < line["blocks_image"] < 2 and 0 < line["blocks_text"] < 2 for line in told)
    assert all("masked_feature" in line for line in told)
    assert not (workspace.cache / "blocks").exists()


def test_blocks_of_a_teacher_that_is_trained_too(path):
    """They are those of the copy that is trained, not of the teacher as it was."""
    workspace = opened(path, 'train.mode="mutual"', "train.accumulation=2", "mutual.lr=0.01")
    run(workspace, until="train")
    still = opened(path, 'train.mode="live"', "train.accumulation=2", out="still")
    run(still, until="train")
    moved, kept = metrics(workspace), metrics(still)
    assert moved[0]["blocks_text"] == pytest.approx(kept[0]["blocks_text"], rel=1e-4)
    assert moved[-1]["blocks_text"] != pytest.approx(kept[-1]["blocks_text"], rel=1e-3)
    assert all("teacher_kl" in line for line in moved)


def test_a_text_tower_alone_has_blocks_of_texts(path):
    text = path.read_text().replace(FEATURES, "[features]\ntext = [{student = 1.0, teacher = 1.0}]\n")
    picture_tower = 'image = "mobilenetv4_conv_small_050"\nimage_size = 32\nimage_init = "random"'
    path.write_text(text.replace(picture_tower, 'image = "teacher"'))
    workspace = opened(path, 'loss.preset="fd"')
    run(workspace, until="train")
    told = metrics(workspace)
    assert told[-1]["blocks_text"] < told[0]["blocks_text"]
    assert "blocks_image" not in told[0]


def test_unpaired_rows_have_blocks_and_a_kind_that_is_not_there_has_none(path):
    text = (
        path.read_text()
        .replace('train = "train"', 'images = "train"')
        .replace("batch = 8\nwarmup", "batch = 0\nwarmup")
    )
    path.write_text(text)
    workspace = opened(path, 'loss.preset="fd"', "train.batch_images=8", 'student.text_init="random"')
    run(workspace, until="train")
    told = metrics(workspace)
    assert all("blocks_image" in line and "blocks_text" not in line for line in told)
    (folder,) = (workspace.cache / "blocks").glob("*-*")
    assert json.loads((folder / "manifest.json").read_text())["text"] == []
