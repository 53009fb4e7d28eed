import numpy as np
import pytest
import tiny
import torch

from clipdistill.cache import Views
from clipdistill.cache import blocks as module
from clipdistill.cache.blocks import BlockPlan, fact_name, fill_blocks, open_blocks
from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.pictures import decode
from clipdistill.data.records import Pair, Picture
from clipdistill.data.views import apply
from clipdistill.towers.pooling import at_unit_scale
from clipdistill.towers.tap import Tap
from clipdistill.towers.teacher import load_teacher

IMAGE, TEXT = ("transformer.resblocks.0", "ln_pre"), ("transformer.resblocks.1",)
VIEWS = Views(count=2, seed=5)
PAIRS = tiny.pairs(11)
TEXTS = tuple(caption for pair in PAIRS for caption in pair.captions)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(f"local-dir:{tiny.teacher_folder(tmp_path_factory.mktemp('t') / 'teacher')}")


def plan(pairs=PAIRS, texts=TEXTS, **changes):
    values = {"cache": "abc", "image": IMAGE, "text": TEXT, "cells": 2}
    return BlockPlan(**(values | changes), pictures=tuple(pair.key for pair in pairs), texts=tuple(texts))


def taps(teacher, wanted):
    return {
        "image": Tap(teacher.model, "image", wanted.image, wanted.cells),
        "text": Tap(teacher.model, "text", wanted.text, wanted.cells),
    }


def filled(folder, teacher, wanted, pairs=PAIRS):
    return fill_blocks(folder, wanted, teacher, taps(teacher, wanted), pairs, views=VIEWS, shard_rows=4, batch=3)


def test_stored_cells_are_the_live_teachers_in_every_view(teacher, tmp_path):
    wanted = plan()
    stored = filled(tmp_path, teacher, wanted)
    keys, views = [PAIRS[7].key, PAIRS[2].key, PAIRS[7].key], [1, 0, 0]
    shown = [decode(PAIRS[row].picture.data, 10**6, "") for row in (7, 2, 7)]
    drawn = [apply(image, VIEWS.of(key, view)) for image, key, view in zip(shown, keys, views, strict=True)]
    tap = taps(teacher, wanted)
    with tap["image"].watching():
        teacher.encode_decoded(drawn)
        live = tap["image"].take()[0].cells
    found = stored.of_images(keys, views)
    assert list(found) == [fact_name("image", name) for name in IMAGE]
    for name in IMAGE:
        cells = found[fact_name("image", name)]
        assert cells.dtype == np.float16
        np.testing.assert_allclose(cells, at_unit_scale(live[name]), atol=4e-3)
        assert not np.array_equal(cells[0], cells[2])
    texts = [TEXTS[9], TEXTS[0], TEXTS[9], TEXTS[15]]
    with tap["text"].watching():
        teacher.encode_texts(texts)
        live = tap["text"].take()[0].cells
    (cells,) = stored.of_texts(texts).values()
    np.testing.assert_allclose(cells, at_unit_scale(live[TEXT[0]]), atol=4e-3)


def test_the_planned_bytes_are_those_that_are_stored(teacher, tmp_path):
    wanted = plan()
    stored = filled(tmp_path, teacher, wanted)
    size = sum(np.load(path).nbytes for path in stored.folder.rglob("*.npy"))
    widths = {"image": dict.fromkeys(IMAGE, 32), "text": dict.fromkeys(TEXT, 32)}
    assert wanted.bytes(widths, views=2) == size == 2 * 32 * (2 * 4 * 11 * 2 + 2 * 22)


def test_a_killed_filling_goes_on_and_ends_with_the_same_files(teacher, tmp_path, monkeypatch):
    whole = filled(tmp_path / "whole", teacher, plan())
    calls, write = [], module.embeddings.write_table

    def dying(path, columns):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(path)
        write(path, columns)

    monkeypatch.setattr(module.embeddings, "write_table", dying)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cut", teacher, plan())
    assert open_blocks(tmp_path / "cut", plan()) is None
    monkeypatch.undo()
    seen = []
    encode = teacher.encode_decoded
    monkeypatch.setattr(teacher, "encode_decoded", lambda images: seen.append(len(images)) or encode(images))
    again = filled(tmp_path / "cut", teacher, plan())
    assert seen == []  # the three shards of pictures were whole
    for path in whole.folder.rglob("*"):
        if path.suffix in (".npy", ".parquet"):
            assert (again.folder / path.relative_to(whole.folder)).read_bytes() == path.read_bytes()
    assert not (again.folder / "plan.json").exists()


def test_stored_blocks_serve_fewer_rows_and_no_others(teacher, tmp_path):
    stored = filled(tmp_path, teacher, plan())
    less = plan(PAIRS[3:5], TEXTS[:2])
    assert open_blocks(tmp_path, less).folder == stored.folder
    assert open_blocks(tmp_path, plan(tiny.pairs(12))) is None
    assert open_blocks(tmp_path, plan(cells=1)) is None
    assert open_blocks(tmp_path, plan(cache="other")) is None
    assert open_blocks(tmp_path, plan(image=IMAGE[:1])) is None
    with pytest.raises(DataError, match="no blocks are stored of the picture 'row/040'"):
        stored.of_images(["row/040"], [0])
    with pytest.raises(DataError, match="no blocks are stored of the text 'nobody'"):
        stored.of_texts(["nobody"])


def test_one_side_alone_is_stored(teacher, tmp_path):
    wanted = plan(text=(), texts=())
    stored = filled(tmp_path, teacher, wanted)
    assert stored.of_texts(["anything"]) == {}
    assert list(stored.of_images([PAIRS[0].key], [0])) == [fact_name("image", name) for name in IMAGE]


def test_a_damaged_file_is_refused(teacher, tmp_path):
    stored = filled(tmp_path, teacher, plan())
    path = stored.folder / "text_0" / "rows_0.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(MismatchError, match="sha256"):
        open_blocks(tmp_path, plan())


def test_a_picture_that_went_away_is_named(teacher, tmp_path):
    gone = Pair("gone", Picture("gone.png", path=tmp_path / "gone.png"), ("x",))
    with pytest.raises(DataError, match=r"gone\.png: cannot be read, though it could when embedded"):
        filled(tmp_path, teacher, plan([gone]), [gone])


def test_the_teacher_is_left_without_hooks(teacher, tmp_path):
    filled(tmp_path, teacher, plan())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in teacher.model.modules())
    assert isinstance(teacher.encode_texts(["a"]), np.ndarray)
    assert torch.is_grad_enabled()
