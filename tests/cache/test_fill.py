import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny

from clipdistill.cache import TeacherCache, Views, fill
from clipdistill.cache.fill import planned_bytes
from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.pictures import decode
from clipdistill.data.records import Pair, Picture
from clipdistill.data.views import apply
from clipdistill.towers.teacher import load_teacher

VIEWS = Views(count=2, seed=5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(f"local-dir:{tiny.teacher_folder(tmp_path_factory.mktemp('t') / 'teacher')}")


@pytest.fixture
def rows():
    return tiny.pairs(20)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_rows_are_the_teachers_own_in_every_view(teacher, rows, tmp_path):
    cache = fill(tmp_path / "c", teacher, rows, ["an unpaired text"], views=VIEWS, shard_rows=8, batch=4)
    keys = [pair.key for pair in rows]
    pictures = [decode(pair.picture.data, 10**6, "") for pair in rows]
    for number in range(2):
        drawn = [apply(image, VIEWS.of(key, number)) for key, image in zip(keys, pictures, strict=True)]
        expected = teacher.encode_decoded(drawn)
        stored = cache.image_rows(keys, [number] * len(keys))
        assert np.linalg.norm(stored, axis=1) == pytest.approx(1, abs=1e-6)
        assert (stored * expected).sum(axis=1).min() > 0.99999
    assert not np.allclose(cache.image_rows(keys, [0] * 20), cache.image_rows(keys, [1] * 20))
    texts = [*(text for pair in rows for text in pair.captions), "an unpaired text"]
    assert (cache.text_rows(texts) * teacher.encode_texts(texts)).sum(axis=1).min() > 0.99999
    mixed = cache.image_rows(["row/003", "row/017", "row/003"], [1, 0, 0])
    np.testing.assert_array_equal(mixed[1], cache.image_rows(["row/017"])[0])
    np.testing.assert_array_equal(mixed[0], cache.image_rows(["row/003"], [1])[0])


def test_the_layout_is_clip_retrievals(teacher, rows, tmp_path):
    fill(tmp_path, teacher, rows, shard_rows=8)
    for number, count in enumerate((8, 8, 4)):
        array = np.load(tmp_path / f"img_emb/img_emb_{number}.npy", mmap_mode="r")
        assert array.dtype == np.float16
        assert array.shape == (count, teacher.dim)
        table = pq.read_table(tmp_path / f"metadata/metadata_{number}.parquet").to_pydict()
        assert len(table["image_path"]) == len(table["caption"]) == count
    assert table["caption"] == [pair.captions[0] for pair in rows[16:]]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["files"].keys() == {name for name in digests(tmp_path) if name != "manifest.json"}
    assert manifest["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)


def test_unique_texts_are_encoded_once(teacher, rows, tmp_path):
    seen: list[str] = []

    class Counting:
        def __getattr__(self, name):
            return getattr(teacher, name)

        def encode_texts(self, texts, batch=256):
            seen.extend(texts)
            return teacher.encode_texts(texts, batch)

    twice = [*rows, *(Pair(f"again/{pair.key}", pair.picture, pair.captions) for pair in rows)]
    fill(tmp_path, Counting(), twice, [rows[0].captions[0]])
    assert len(seen) == len(set(seen)) == 40


def test_a_picture_that_does_not_decode_is_refused_by_name_and_the_others_kept(teacher, rows, tmp_path):
    broken = Pair("bad", Picture("bad.png", data=tiny.image_bytes(1)[:60]), ("a torn picture",))
    cache = fill(tmp_path, teacher, [*rows[:3], broken, *rows[3:]], shard_rows=4)
    assert [row.key for row in cache.rejected] == ["bad"]
    assert cache.rejected[0].reason
    assert not cache.has_image("bad")
    kept = cache.image_rows([pair.key for pair in rows])
    assert (kept * teacher.encode_images([pair.picture for pair in rows])).sum(axis=1).min() > 0.99999
    with pytest.raises(DataError, match="bad"):
        cache.image_rows(["bad"])


KILLED = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import tiny
from clipdistill.cache import Views, fill
from clipdistill.towers.teacher import load_teacher
teacher = load_teacher("local-dir:" + sys.argv[1])
encode = teacher.encode_decoded
def slow(images):
    print("batch", flush=True)
    time.sleep(0.15)
    return encode(images)
teacher.encode_decoded = slow
views = Views(count=2, seed=5)
fill(Path(sys.argv[2]), teacher, tiny.pairs(20), ["an unpaired text"], views=views, shard_rows=4, batch=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 6, 13])
def test_killed_at_any_moment_it_goes_on_and_ends_bit_identical(teacher, tmp_path, batches):
    folder = tmp_path / "teacher"
    tiny.teacher_folder(folder)
    again = load_teacher(f"local-dir:{folder}")
    whole = tmp_path / "whole"
    fill(whole, again, tiny.pairs(20), ["an unpaired text"], views=VIEWS, shard_rows=4, batch=2)
    script = textwrap.dedent(KILLED.format(tests=str(Path(tiny.__file__).parent)))
    cut = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), str(cut)], stdout=subprocess.PIPE, text=True)
    for _ in range(batches):
        assert process.stdout.readline() == "batch\n"
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (cut / "manifest.json").exists()
    with pytest.raises(DataError, match="not finished"):
        TeacherCache.open(cut)
    kept = digests(cut / "shards") if (cut / "shards").exists() else {}
    fill(cut, again, tiny.pairs(20), ["an unpaired text"], views=VIEWS, shard_rows=4, batch=2)
    assert digests(cut) == digests(whole)
    if batches == 13:
        assert kept, "three shards were whole by then"


def test_a_torn_shard_is_made_again(teacher, rows, tmp_path):
    class Dying:
        calls = 0

        def __getattr__(self, name):
            return getattr(teacher, name)

        def encode_decoded(self, images):
            self.calls += 1
            if self.calls > 3:
                raise KeyboardInterrupt
            return teacher.encode_decoded(images)

    fill(tmp_path / "whole", teacher, rows, shard_rows=5, batch=5)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "cut", Dying(), rows, shard_rows=5, batch=5)
    torn = tmp_path / "cut/img_emb/img_emb_1.npy"
    torn.write_bytes(torn.read_bytes()[:-7])
    fill(tmp_path / "cut", teacher, rows, shard_rows=5, batch=5)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_half_filled_folder_of_other_inputs_is_refused(teacher, rows, tmp_path):
    (tmp_path / "c").mkdir()
    fill(tmp_path / "c", teacher, rows)
    with pytest.raises(MismatchError, match=r"plan\.pictures"):
        fill(tmp_path / "c", teacher, rows[:-1])
    with pytest.raises(MismatchError, match=r"plan\.views"):
        fill(tmp_path / "c", teacher, rows, views=VIEWS)


def test_float32_rows_are_the_teachers_to_the_last_bit(teacher, rows, tmp_path):
    cache = fill(tmp_path, teacher, rows, views=VIEWS, shard_rows=8, batch=20, dtype="float32")
    assert cache.dtype == TeacherCache.open(tmp_path).dtype == "float32"
    assert json.loads((tmp_path / "manifest.json").read_text())["dtype"] == "float32"
    stored = [np.load(tmp_path / f"img_emb/img_emb_{number}.npy") for number in range(3)]
    pictures = [decode(pair.picture.data, 10**6, "") for pair in rows]
    wanted = [teacher.encode_decoded(pictures[start : start + 8]) for start in (0, 8, 16)]
    np.testing.assert_array_equal(np.concatenate(stored), np.concatenate(wanted))
    held = [*tmp_path.glob("img_emb*/*.npy"), *tmp_path.glob("text_emb/*.npy")]
    headers = 128 * len(held)
    planned = planned_bytes(20, 40, teacher.dim, 2, "float32")
    assert sum(path.stat().st_size for path in held) - headers == planned == 2 * planned_bytes(20, 40, teacher.dim, 2)


def test_a_cache_in_another_precision_is_refused_finished_or_not(teacher, rows, tmp_path):
    fill(tmp_path / "whole", teacher, rows)
    with pytest.raises(MismatchError, match=r"plan\.dtype does not match: expected float32, found float16"):
        fill(tmp_path / "whole", teacher, rows, dtype="float32")
    (tmp_path / "half").mkdir()
    plan = json.loads((tmp_path / "whole/manifest.json").read_text())["plan"]
    (tmp_path / "half/plan.json").write_text(json.dumps(plan))
    with pytest.raises(MismatchError, match=r"plan\.dtype"):
        fill(tmp_path / "half", teacher, rows, dtype="float32")


def test_a_cache_from_before_there_was_a_choice_of_precision_is_float16(teacher, rows, tmp_path):
    made = fill(tmp_path, teacher, rows)
    path = tmp_path / "manifest.json"
    facts = json.loads(path.read_text())
    del facts["plan"]["dtype"]
    path.write_text(json.dumps(facts))
    assert fill(tmp_path, teacher, rows).fingerprint == made.fingerprint
    with pytest.raises(MismatchError, match=r"plan\.dtype"):
        fill(tmp_path, teacher, rows, dtype="float32")
