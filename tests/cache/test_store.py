import numpy as np
import pytest
import tiny

from clipdistill.cache import TeacherCache, Views, fill
from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.records import Pair, Picture
from clipdistill.towers.teacher import load_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(f"local-dir:{tiny.teacher_folder(tmp_path_factory.mktemp('t') / 'teacher')}")


@pytest.fixture
def cache(teacher, tmp_path):
    return fill(tmp_path / "cache", teacher, tiny.pairs(12), shard_rows=5)


def test_a_reopened_cache_is_the_same(cache):
    again = TeacherCache.open(cache.folder)
    keys = [f"row/{n:03d}" for n in (11, 0, 5)]
    np.testing.assert_array_equal(again.image_rows(keys), cache.image_rows(keys))
    assert again.fingerprint == cache.fingerprint
    assert again.mark("row/000") is not None
    assert again.mark("nothing") is None


@pytest.mark.parametrize("name", ["img_emb/img_emb_1.npy", "text_emb/text_emb_0.npy", "metadata/metadata_0.parquet"])
def test_a_changed_file_is_named_with_both_hashes(cache, name):
    path = cache.folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MismatchError, match=rf"{name}: sha256 .* expected [0-9a-f]{{64}}, found [0-9a-f]{{64}}"):
        TeacherCache.open(cache.folder)


def test_a_missing_file_is_named(cache):
    (cache.folder / "img_emb/img_emb_0.npy").unlink()
    with pytest.raises(MismatchError, match="no file"):
        TeacherCache.open(cache.folder)


def test_an_unknown_key_is_named(cache):
    with pytest.raises(DataError, match="'row/999'"):
        cache.image_rows(["row/000", "row/999"])
    with pytest.raises(DataError, match="'no such text'"):
        cache.text_rows(["no such text"])


def test_another_teacher_is_refused_by_the_part_that_differs(cache, teacher, tmp_path):
    cache.check_teacher(teacher)
    other = load_teacher(f"local-dir:{tiny.teacher_folder(tmp_path / 'other', seed=1)}")
    with pytest.raises(MismatchError, match=r"teacher\.weights"):
        cache.check_teacher(other)
    squashed = load_teacher(f"local-dir:{tiny.teacher_folder(tmp_path / 'same')}")
    squashed.model.visual.preprocess_cfg["resize_mode"] = "squash"
    with pytest.raises(MismatchError, match=r"teacher\.preprocess"):
        cache.check_teacher(squashed)


def test_other_views_are_refused(cache):
    cache.check_views(Views(seed=9))  # one view is the whole picture whatever the seed
    with pytest.raises(MismatchError, match=r"views\.count does not match: expected 3, found 1"):
        cache.check_views(Views(count=3))


def test_another_precision_is_refused_with_both_named(cache):
    cache.check_dtype("float16")
    with pytest.raises(MismatchError, match=r"cache\.dtype does not match: expected float32, found float16"):
        cache.check_dtype("float32")


def test_changed_data_are_refused(cache):
    rows = tiny.pairs(12)
    cache.check_data(rows, [])
    with pytest.raises(MismatchError, match="row/012"):
        cache.check_data(tiny.pairs(13), [])
    with pytest.raises(MismatchError, match="another text"):
        cache.check_data(rows, ["another text"])
    changed = Pair("row/003", Picture("x", data=tiny.image_bytes(99)), rows[3].captions)
    with pytest.raises(MismatchError, match="row/003: content"):
        cache.check_data([*rows[:3], changed], [])


def test_a_changed_file_on_disk_is_seen_by_its_size(teacher, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(tiny.image_bytes(1))
    rows = [Pair("a", Picture(str(path), path=path), ("a",))]
    cache = fill(tmp_path / "c", teacher, rows)
    cache.check_data(rows, [])
    path.write_bytes(tiny.image_bytes(1, size=(80, 80)))
    with pytest.raises(MismatchError, match="bytes"):
        cache.check_data(rows, [])


def test_the_probe_refuses_rows_that_the_teacher_does_not_make(cache, teacher, tmp_path):
    rows = tiny.pairs(12)
    assert cache.probe(teacher, rows, rows=6, cosine=0.9999) > 0.9999
    assert cache.probe(teacher, rows, rows=0, cosine=0.9999) == 1.0
    other = load_teacher(f"local-dir:{tiny.teacher_folder(tmp_path / 'other', seed=1)}")
    with pytest.raises(MismatchError, match="cosine with the live teacher"):
        cache.probe(other, rows, rows=6, cosine=0.999)


def test_another_kind_of_folder_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"kind": "index", "version": 1}')
    with pytest.raises(MismatchError, match="kind does not match: expected teacher-cache, found index"):
        TeacherCache.open(tmp_path)
    (tmp_path / "manifest.json").write_text("not json")
    with pytest.raises(DataError, match="not readable"):
        TeacherCache.open(tmp_path)


def test_folders_may_be_strings(cache, teacher, tmp_path):
    again = fill(str(tmp_path / "again"), teacher, tiny.pairs(12), shard_rows=5)
    assert TeacherCache.open(str(cache.folder)).fingerprint == TeacherCache.open(again.folder).fingerprint
