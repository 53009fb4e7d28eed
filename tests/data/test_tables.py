import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.sources import SourceSpec

EMOJI = Path(__file__).parents[2] / "data" / "emoji" / "val.parquet"


def captions(source):
    return {pair.key: pair.captions for pair in source.pairs}


def reasons(source):
    return {item.key: item.reason for item in source.rejected}


@pytest.fixture
def pictures(tmp_path, encode):
    (tmp_path / "img").mkdir()
    for number in range(4):
        (tmp_path / "img" / f"{number}.jpg").write_bytes(encode("JPEG", seed=number))
    return [f"img/{number}.jpg" for number in range(4)]


def test_open_clip_s_own_csv_needs_no_option_and_its_rows_join_by_picture(pictures, load, tmp_path, encode):
    frame = pd.DataFrame(
        {"filepath": [pictures[0], pictures[1], pictures[0]], "title": ["one, two", "three", 'a "quoted"\tTAB']}
    )
    frame.to_csv(tmp_path / "train.csv", sep="\t", index=False)
    source = load("train.csv")
    assert captions(source) == {"img/0.jpg": ("one, two", 'a "quoted"\tTAB'), "img/1.jpg": ("three",)}
    assert source.pairs[0].picture.read() == encode("JPEG", seed=0)
    assert source.rejected == ()


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_csv_separators(separator, pictures, load, tmp_path):
    frame = pd.DataFrame({"key": ["a", "b"], "image": pictures[:2], "caption": ["x, y; z", "w"]})
    frame.to_csv(tmp_path / "train.csv", sep=separator, index=False)
    options = {"separator": ";"} if separator == ";" else {}
    assert captions(load("train.csv", **options)) == {"a": ("x, y; z",), "b": ("w",)}


def test_a_tsv_is_tab_separated_even_with_one_column(load, tmp_path):
    (tmp_path / "texts.tsv").write_text("text\nred, green\n")
    assert captions(load("texts.tsv", kind="texts")) == {"texts/0": ("red, green",)}


def test_a_byte_order_mark_and_line_breaks_inside_quotes_are_no_trouble(pictures, load, tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbffilepath,title\r\nimg/0.jpg,"two\r\nlines"\r\n\r\nimg/1.jpg,one\r\n')
    assert captions(load("a.csv")) == {"img/0.jpg": ("two\r\nlines",), "img/1.jpg": ("one",)}


def test_csv_rows_that_cannot_be_used_are_refused_with_the_reason(pictures, load, tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    rows = [
        b"key\tfilepath\ttitle",
        b"good\timg/0.jpg\tfine",
        b"latin\timg/1.jpg\tcaf\xe9",
        b"blank\timg/1.jpg\t   ",
        b"short\timg/1.jpg",
        b"long\timg/1.jpg\ta\tb",
        b"gone\timg/9.jpg\ta",
        b"none\t\ta",
        b"named\ttext.jpg\ta",
        b"good\timg/2.jpg\ttwice",
        b"\timg/2.jpg\tno key",
        b"web\thttps://example.org/a.jpg\ta",
        b"\xff\timg/3.jpg\ta",
        b"folder\timg\ta",
        b"big\timg/3.jpg\t" + b"x" * 140_000,
        b"last\timg/3.jpg\tfine",
    ]
    (tmp_path / "a.tsv").write_bytes(b"\n".join(rows) + b"\n")
    source = load("a.tsv")
    assert list(captions(source)) == ["good", "last"]
    assert reasons(source) == {
        "latin": "caption is not UTF-8",
        "blank": "no caption",
        "short": "no caption",
        "a/4": "broken row: 4 fields under 3 columns (a separator not in quotes?)",
        "gone": "missing file",
        "none": "no picture",
        "named": "not a picture (wrongly named?): none of JPEG, PNG, WEBP, GIF, BMP, TIFF",
        "good": "duplicate key: first in a.tsv[0]",
        "a/9": "no key",
        "web": "picture is a web address: download it first, with img2dataset for example",
        "\\udcff": "key is not UTF-8",
        "folder": "not a plain file",
        "a/13": "broken row: field larger than field limit (131072)",
    }
    assert source.rejected[0].origin == "a.tsv[1]"


def test_named_columns_win_and_several_captions_are_kept_in_order(pictures, load, tmp_path):
    frame = pd.DataFrame(
        {"sku": [7, 8], "title": ["no", "no"], "photo": pictures[:2], "long": ["l7", None], "short": ["s7", "s8"]}
    )
    frame.to_parquet(tmp_path / "shop.parquet")
    source = load("shop.parquet", image="photo", captions=("short", "long"), key="sku")
    assert captions(source) == {"7": ("s7", "l7"), "8": ("s8",)}


def test_every_unknown_column_is_reported_at_once_with_the_nearest(pictures, load, tmp_path):
    pd.DataFrame({"photo": pictures, "title": pictures, "sku": pictures}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ConfigError) as caught:
        load("a.csv", image="foto", captions=("titel", "title"), key="skuu")
    assert caught.value.faults == [
        "data: a.csv: image: no column 'foto'; did you mean 'photo'?",
        "data: a.csv: captions: no column 'titel'; did you mean 'title'?",
        "data: a.csv: key: no column 'skuu'; did you mean 'sku'?",
    ]


def test_columns_that_cannot_be_guessed_are_asked_for(load, tmp_path):
    (tmp_path / "a.csv").write_text("foo,bar\n1,2\n")
    with pytest.raises(ConfigError) as caught:
        load("a.csv")
    assert "no picture column is known; its columns are: foo, bar; set image = " in caught.value.faults[0]
    assert "no caption column is known" in caught.value.faults[1]


def test_a_column_named_twice_is_refused(load, tmp_path):
    (tmp_path / "a.csv").write_text("filepath,title,title\n1,2,3\n")
    with pytest.raises(ConfigError, match="several columns are named 'title'"):
        load("a.csv")


def test_relative_paths_start_from_the_table_or_from_root(pictures, load, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.csv").write_text("filepath,title\n0.jpg,a\n")
    assert reasons(load("lists/a.csv")) == {"0.jpg": "missing file"}
    assert captions(load("lists/a.csv", root="img")) == {"0.jpg": ("a",)}
    assert captions(load("lists/a.csv", root=str(tmp_path / "img"))) == {"0.jpg": ("a",)}


def test_a_split_column_chooses_rows(pictures, load, tmp_path):
    frame = pd.DataFrame({"filepath": pictures, "title": list("abcd"), "split": ["train", "val", "train", "test"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert captions(load("a.csv", split="train")) == {"img/0.jpg": ("a",), "img/2.jpg": ("c",)}
    with pytest.raises(ConfigError, match="no row of split 'vall'; did you mean 'val'"):
        load("a.csv", split="vall")
    frame.drop(columns="split").to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(ConfigError, match=r"b\.csv: split = 'val' needs a column 'split'"):
        load("b.csv", split="val")


def test_json_lines_with_lists_missing_fields_and_broken_lines(pictures, load, tmp_path):
    rows = [
        {"id": 1, "image": pictures[0], "captions": ["a", " ", "b"]},
        {"id": "x", "image": pictures[1], "captions": "c"},
        {"id": 3, "image": pictures[2]},
        {"id": 4, "image": pictures[2], "captions": [{"text": "d"}]},
        {"id": 5, "image": pictures[2], "captions": "lone \ud800 surrogate"},
        {"image": pictures[2], "captions": "e"},
        {"id": 1.5, "image": pictures[2], "captions": "e"},
        {"id": 6, "image": 17, "captions": "e"},
        [1, 2],
    ]
    lines = [json.dumps(row) for row in rows] + ['{"id": 9, "image"', ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    source = load("a.jsonl")
    assert captions(source) == {"1": ("a", "b"), "x": ("c",)}
    found = reasons(source)
    assert found.pop("a/9").startswith("broken row: not JSON")
    assert found == {
        "3": "no caption",
        "4": "caption is not a text: dict",
        "5": "caption is not UTF-8",
        "a/5": "no key",
        "1.5": "key is not a text or a whole number: float",
        "6": "picture is neither a path nor bytes: int",
        "a/8": "broken row: not a JSON object",
    }


def test_json_lines_with_an_undecodable_byte_lose_that_row_only(pictures, load, tmp_path):
    lines = [
        b'{"filepath": "img/%d.jpg", "title": "%s"}' % (number, text) for number, text in enumerate([b"a", b"\xff"])
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = load("a.jsonl")
    assert captions(source) == {"img/0.jpg": ("a",)}
    assert reasons(source) == {"img/1.jpg": "caption is not UTF-8"}


def test_a_file_that_is_not_json_lines_is_an_error(load, tmp_path):
    (tmp_path / "a.jsonl").write_text("key,title\n1,2\n")
    with pytest.raises(DataError, match=r"a\.jsonl: none of its first 2 lines is a JSON object"):
        load("a.jsonl")


@pytest.fixture
def hugging_face(tmp_path, encode):
    """The layout that datasets writes: a struct of bytes and path, and a list of captions, in several row groups."""
    images = [{"bytes": encode("PNG", seed=number), "path": f"{number}.png"} for number in range(4)]
    images += [{"bytes": None, "path": "img/0.jpg"}, None]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "captions": pa.array([["a", "b"], ["c"], [], None, ["d"], ["e"]], pa.list_(pa.string())),
            "unused": pa.array([b"x" * 1000] * 6),
        }
    )
    pq.write_table(table, tmp_path / "train-00000.parquet", row_group_size=2)
    return images


def test_hugging_face_parquet_is_read_with_bytes_or_path(hugging_face, pictures, load, encode):
    source = load("train-00000.parquet")
    assert captions(source) == {
        "train-00000/0": ("a", "b"),
        "train-00000/1": ("c",),
        "img/0.jpg": ("d",),
    }
    assert source.pairs[1].picture.data == hugging_face[1]["bytes"]
    assert source.pairs[1].picture.origin == "train-00000.parquet[1]"
    assert source.pairs[2].picture.read() == encode("JPEG", seed=0)
    assert reasons(source) == {
        "train-00000/2": "no caption",
        "train-00000/3": "no caption",
        "train-00000/5": "no picture",
    }


def test_only_the_needed_columns_are_read(hugging_face, load, monkeypatch):
    asked = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, columns, **options):
        asked.append(columns)
        return original(self, *args, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    load("train-00000.parquet", kind="images")
    load("train-00000.parquet", kind="texts")
    load("train-00000.parquet")
    assert asked == [["image"], ["captions"], ["image", "captions"]]


def test_parquet_with_a_bytes_column_a_text_column_and_a_bad_text(load, tmp_path, encode):
    bad = pa.array([b"fine", b"caf\xe9"], pa.binary()).view(pa.string())
    table = pa.table({"key": ["a", "b"], "jpg": [encode("JPEG"), encode("WEBP")], "txt": bad})
    pq.write_table(table, tmp_path / "a.parquet")
    source = load("a.parquet")
    assert captions(source) == {"a": ("fine",)}
    assert [item.reason for item in source.rejected] == ["caption is not UTF-8"]


def test_a_torn_parquet_file_is_an_error_that_names_it(hugging_face, load, tmp_path):
    path = tmp_path / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-00000\.parquet: not a whole Parquet file"):
        load("train-00000.parquet")


def test_imagefolder_metadata_is_found_in_its_folder(load, tmp_path, encode):
    for split in ("train", "val"):
        folder = tmp_path / split
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "1.png").write_bytes(encode("PNG", seed=len(split)))
        (folder / "not-listed.png").write_bytes(encode("PNG"))
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\nsub/1.png,a\n")
    (tmp_path / "val" / "metadata.jsonl").write_text('{"file_name": "sub/1.png", "text": "b"}\n')
    taken = set()
    assert captions(load("train", taken=taken)) == {"sub/1.png": ("a",)}
    # The same name in another split's folder is another picture: its key is lengthened, not refused.
    assert captions(load("val", taken=taken)) == {"val/sub/1.png": ("b",)}
    pd.DataFrame({"file_name": ["sub/1.png"], "text": ["c"]}).to_parquet(tmp_path / "val" / "metadata.parquet")
    (tmp_path / "val" / "metadata.jsonl").unlink()
    assert captions(load("val")) == {"sub/1.png": ("c",)}


def test_a_folder_of_parquet_files_is_read_in_order(load, tmp_path):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for number in (1, 0):
        pd.DataFrame({"text": [f"t{number}"]}).to_parquet(tmp_path / "hub" / "data" / f"train-{number}.parquet")
    assert captions(load("hub", kind="texts")) == {"train-0/0": ("t0",), "train-1/0": ("t1",)}


def test_the_same_picture_in_another_split_is_refused(pictures, load, tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text("filepath,title\nimg/0.jpg,a\n")
    taken = set()
    assert len(load("train.csv", taken=taken)) == 1
    source = load("val.csv", taken=taken)
    assert reasons(source) == {"img/0.jpg": "duplicate key: first in another split"}
    with pytest.raises(ConfigError, match="separator must be one character"):
        load(SourceSpec(path="val.csv", separator="||"))


def test_an_empty_table_is_an_error(load, tmp_path):
    for text in ("", "filepath,title\n"):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(DataError, match=r"a\.csv: it holds no rows"):
            load("a.csv")


@pytest.mark.skipif(not EMOJI.exists(), reason="the embedded data set is not built")
def test_the_embedded_emoji_set_is_read_whole(load):
    source = load(str(EMOJI))
    table = pq.read_table(EMOJI, columns=["key", "captions"]).to_pydict()
    assert source.rejected == ()
    assert [pair.key for pair in source.pairs] == table["key"]
    assert [list(pair.captions) for pair in source.pairs] == table["captions"]
