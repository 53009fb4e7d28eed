import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdistill.cache import adopt
from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.records import Pair, Picture

PATHS = ["pictures/a.jpg", "pictures/b.jpg", "other/b.jpg", "c.png"]
CAPTIONS = ["an apple", "a boat", "a boat", "a cat"]


def clip_retrieval_folder(folder, *, dim=6, dtype=np.float16, texts=True, parts=2):
    """What clip-retrieval's inference writes: embeddings and metadata, row for row, in numbered parts."""
    rng = np.random.default_rng(0)
    images, words = rng.normal(size=(2, 4, dim))
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for part, rows in enumerate(np.array_split(np.arange(4), parts)):
        np.save(folder / f"img_emb/img_emb_{part}.npy", images[rows].astype(dtype))
        if texts:
            np.save(folder / f"text_emb/text_emb_{part}.npy", words[rows].astype(dtype))
        table = {"image_path": [PATHS[row] for row in rows], "caption": [CAPTIONS[row] for row in rows]}
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{part}.parquet")
    return images, words


def pair(key, *captions, origin=None):
    return Pair(key, Picture(origin or key, data=b"x"), captions)


def test_rows_are_found_by_path_name_or_stem_and_made_unit(tmp_path):
    images, words = clip_retrieval_folder(tmp_path)
    rows = [pair("a", "an apple"), pair("pictures/b.jpg"), pair("x", origin="/data/c.png")]
    cache = adopt(tmp_path, rows, logit_scale=100.0)
    expected = images[[0, 1, 3]] / np.linalg.norm(images[[0, 1, 3]], axis=1, keepdims=True)
    np.testing.assert_allclose(cache.image_rows(["a", "pictures/b.jpg", "x"]), expected, atol=2e-3)
    word = words[1] / np.linalg.norm(words[1])
    np.testing.assert_allclose(cache.text_rows(["a boat"])[0], word, atol=2e-3)
    assert cache.scale == 100.0
    assert cache.bias is None
    assert cache.views == 1
    assert cache.mark("a") is None


def test_a_name_of_several_rows_identifies_none(tmp_path):
    clip_retrieval_folder(tmp_path)
    cache = adopt(tmp_path, [pair("b"), pair("b.jpg"), pair("other/b.jpg")], logit_scale=1.0)
    assert not cache.has_image("b")
    assert not cache.has_image("b.jpg")
    assert cache.has_image("other/b.jpg")


def test_pictures_alone(tmp_path):
    clip_retrieval_folder(tmp_path, texts=False)
    cache = adopt(tmp_path, [pair("a")], logit_scale=1.0)
    assert cache.dim == 6
    assert not cache.has_text("an apple")


@pytest.mark.parametrize("fault", ["counts", "nan", "dims", "no metadata", "nothing", "integers"])
def test_faults_are_named(tmp_path, fault):
    if fault == "nothing":
        (tmp_path / "metadata").mkdir()
        pq.write_table(pa.table({"caption": ["x"]}), tmp_path / "metadata/metadata_0.parquet")
    else:
        clip_retrieval_folder(tmp_path)
    if fault == "counts":
        np.save(tmp_path / "img_emb/img_emb_1.npy", np.ones((1, 6), np.float16))
    if fault == "nan":
        np.save(tmp_path / "img_emb/img_emb_1.npy", np.full((2, 6), np.nan, np.float16))
    if fault == "integers":
        np.save(tmp_path / "img_emb/img_emb_1.npy", np.ones((2, 6), np.int8))
    if fault == "dims":
        for part in range(2):
            np.save(tmp_path / f"text_emb/text_emb_{part}.npy", np.ones((2, 5), np.float16))
    if fault == "no metadata":
        for path in (tmp_path / "metadata").iterdir():
            path.unlink()
    expected = {
        "counts": "img_emb has 3 rows, metadata has 4",
        "nan": "img_emb_1.npy: row 0 is zero or not finite",
        "dims": "img_emb is 6 wide and text_emb 5",
        "no metadata": "no metadata",
        "nothing": "not an embeddings folder",
        "integers": "int8",
    }[fault]
    with pytest.raises(DataError, match=expected):
        adopt(tmp_path, [pair("a")], logit_scale=1.0)


def test_its_fingerprint_follows_its_files(tmp_path):
    clip_retrieval_folder(tmp_path / "a")
    clip_retrieval_folder(tmp_path / "b")
    same = [adopt(tmp_path / name, [pair("a")], logit_scale=1.0, name="m").fingerprint for name in "ab"]
    assert same[0] == same[1]
    np.save(tmp_path / "b/img_emb/img_emb_1.npy", np.ones((2, 6), np.float16))
    assert adopt(tmp_path / "b", [pair("a")], logit_scale=1.0, name="m").fingerprint != same[0]


def test_rows_that_the_folder_lacks_are_named_and_not_to_be_built_again(tmp_path):
    clip_retrieval_folder(tmp_path)
    cache = adopt(str(tmp_path), [pair("a", "an apple"), pair("z")], logit_scale=1.0)
    cache.check_data([pair("a", "an apple")], ["a boat"])
    with pytest.raises(MismatchError, match=r"data\.pictures.*rows for all 2.*'z'.*Add the rows") as fault:
        cache.check_data([pair("a", "an apple"), pair("z")], [])
    assert "--force" not in str(fault.value)
    with pytest.raises(MismatchError, match=r"data\.texts.*'a text without a row'.*Add the rows"):
        cache.check_data([], ["a text without a row"])
