import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.classes import check_sets, classes_of, prompted
from clipdistill.data.sources import Source
from clipdistill.data.splits import share_of_source, split_source


def labels(source):
    return {pair.key: pair.label for pair in source.pairs}


def reasons(source):
    return {item.key: item.reason for item in source.rejected}


@pytest.fixture
def folder(tmp_path, encode):
    top = tmp_path / "train"
    for number, place in enumerate(
        ("red_fox/a.jpg", "red_fox/deep/er/b.png", "owl/a.jpg", "owl/.hidden.jpg", ".git/x.jpg")
    ):
        (top / place).parent.mkdir(parents=True, exist_ok=True)
        (top / place).write_bytes(encode("PNG" if place.endswith("png") else "JPEG", seed=number))
    (top / "owl" / "notes.txt").write_text("not a caption")
    return top


def test_a_folder_of_classes_gives_each_picture_its_sub_folder_s_name(folder, load):
    for options in ({}, {"format": "classes"}):
        source = load("train", kind="classes", **options)
        assert labels(source) == {
            "train/owl/a.jpg": "owl",
            "train/red_fox/a.jpg": "red_fox",
            "train/red_fox/deep/er/b.png": "red_fox",
        }
        assert source.rejected == ()
        assert source.labels == ("owl", "red_fox")
        assert all(pair.captions == () for pair in source.pairs)


def test_a_picture_beside_the_class_folders_is_refused(folder, load, encode):
    (folder / "stray.jpg").write_bytes(encode("JPEG", seed=9))
    source = load("train", kind="classes")
    assert reasons(source) == {"train/stray.jpg": "no label: it lies in no class's folder"}
    assert len(source) == 3


def test_empty_class_folders_are_named(folder, load):
    (folder / "bat").mkdir()
    (folder / "cow" / "inside").mkdir(parents=True)
    (folder / "cow" / "readme.txt").write_text("x")
    with pytest.raises(DataError, match=r"2 of 4 class folders hold no picture: 'bat', 'cow'"):
        load("train", kind="classes")


def test_unreadable_pictures_are_refused_as_ever_and_their_class_is_still_known(folder, load):
    (folder / "owl" / "a.jpg").write_bytes(b"no picture")
    source = load("train", kind="classes")
    assert list(reasons(source)) == ["train/owl/a.jpg"]
    assert source.labels == ("owl", "red_fox")
    classes = classes_of(source.labels, ("{}",), {})
    with pytest.raises(DataError, match=r"data\.train: 1 of 2 classes have no picture left to train on: 'owl'"):
        check_sets(classes, {"train": source})


def test_a_label_changes_the_fingerprint_and_no_label_leaves_it(folder, load):
    source, plain = load("train", kind="classes"), load("train", kind="images")
    without = Source(tuple(pair for pair in plain.pairs), plain.weights)
    assert source.fingerprint != without.fingerprint
    (folder / "owl").rename(folder / "auk")
    assert load("train", kind="classes").fingerprint != source.fingerprint


@pytest.fixture
def table(tmp_path, encode):
    (tmp_path / "img").mkdir()
    for number in range(4):
        (tmp_path / "img" / f"{number}.jpg").write_bytes(encode("JPEG", seed=number))
    return pd.DataFrame({"image": [f"img/{number}.jpg" for number in range(4)], "label": ["cat", "dog", "cat", "owl"]})


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_every_table_has_a_class_column_detected_or_named(name, table, load, tmp_path):
    for column in ("label", "class", "kind"):
        frame = table.rename(columns={"label": column})
        {
            "csv": lambda path, rows: rows.to_csv(path, index=False),
            "tsv": lambda path, rows: rows.to_csv(path, index=False, sep="\t"),
            "jsonl": lambda path, rows: rows.to_json(path, orient="records", lines=True),
            "parquet": lambda path, rows: rows.to_parquet(path),
        }[name.split(".")[1]](tmp_path / name, frame)
        options = {"label": "kind"} if column == "kind" else {}
        source = load(name, kind="classes", **options)
        assert [pair.label for pair in source.pairs] == ["cat", "dog", "cat", "owl"]


def test_rows_without_a_usable_label_are_refused_with_the_reason(table, load, tmp_path):
    frame = table.assign(label=["cat", " ", None, "owl"], key=list("abcd"))
    frame.to_csv(tmp_path / "a.csv", index=False)
    source = load("a.csv", kind="classes")
    assert labels(source) == {"a": "cat", "d": "owl"}
    assert reasons(source) == {"b": "no label", "c": "no label"}
    rows = [{"key": "a", "image": "img/0.jpg", "label": 3}, {"key": "b", "image": "img/1.jpg", "label": ["x"]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = load("b.jsonl", kind="classes")
    assert labels(source) == {"a": "3"}
    assert reasons(source) == {"b": "label is not a text or a whole number: list"}


def test_one_picture_with_two_classes_is_refused_the_second_time(table, load, tmp_path):
    frame = pd.concat([table, pd.DataFrame({"image": ["img/0.jpg", "img/1.jpg"], "label": ["owl", "dog"]})])
    frame.to_csv(tmp_path / "a.csv", index=False)
    source = load("a.csv", kind="classes")
    assert len(source) == 4
    assert reasons(source) == {"img/0.jpg": "second label: 'owl', and 'cat' in an earlier row"}


def test_hugging_face_s_numbered_classes_are_read_by_their_names(load, tmp_path, encode):
    features = {"label": {"names": ["tench", "great white shark"], "_type": "ClassLabel"}}
    pictures = [{"bytes": encode("JPEG", seed=number), "path": None} for number in range(3)]
    rows = pa.table({"image": pictures, "label": pa.array([1, 0, -1])})
    kept = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(kept, tmp_path / "named.parquet")
    pq.write_table(rows, tmp_path / "bare.parquet")
    source = load("named.parquet", kind="classes")
    assert [pair.label for pair in source.pairs] == ["great white shark", "tench"]
    assert reasons(source) == {"named/2": "no label"}
    assert [pair.label for pair in load("bare.parquet", kind="classes").pairs] == ["1", "0", "-1"]


def test_tars_have_classes_in_a_member_or_a_field(load, write_tar, encode, tmp_path):
    members = {
        "0.jpg": encode("JPEG", seed=0), "0.cls": b"7\n",
        "1.jpg": encode("JPEG", seed=1), "1.json": b'{"label": "owl"}',
        "2.jpg": encode("JPEG", seed=2),
    }  # fmt: skip
    write_tar(tmp_path / "a.tar", list(members.items()))
    source = load("a.tar", kind="classes")
    assert labels(source) == {"0": "7", "1": "owl"}
    assert reasons(source) == {"2": "no label"}
    with pytest.raises(
        ConfigError, match=r"label: no member extension or JSON field 'labl' in it; did you mean 'label'"
    ):
        load("a.tar", kind="classes", label="labl")


def test_formats_and_columns_without_classes_are_told(folder, table, load, tmp_path):
    with pytest.raises(ConfigError, match=r"format folder has no classes.*those that do: classes, csv"):
        load("train", kind="classes", format="folder")
    with pytest.raises(ConfigError, match=r'format classes has no captions; set task\.kind = "classification"'):
        load("train", format="classes")
    table.drop(columns="label").to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ConfigError, match=r"no column of classes is known; its columns are: image; set label ="):
        load("a.csv", kind="classes")
    table.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(ConfigError, match="label: no column 'lable'; did you mean 'label'"):
        load("a.csv", kind="classes", label="lable")


def test_classes_are_sorted_named_and_prompted(folder, load):
    source = load("train", kind="classes")
    classes = classes_of(source.labels, ("a photo of a {}.", "{} and {}"), {"owl": "great owl"})
    assert classes.labels == ("owl", "red_fox")
    assert classes.names == ("great owl", "red fox")
    assert classes.every_prompt == (
        "a photo of a great owl.", "great owl and great owl", "a photo of a red fox.", "red fox and red fox",
    )  # fmt: skip
    assert classes.numbers(["red_fox", None, "owl", "cat"]).tolist() == [1, -1, 0, -1]
    ready = prompted(classes, source)
    assert ready.pairs[0].captions == classes.every_prompt[:2]
    assert [pair.key for pair in ready.pairs] == [pair.key for pair in source.pairs]
    braces = classes_of(("a", "b"), ("{0} {}",), {"a": "{}"})
    assert braces.every_prompt == ("{0} {}", "{0} b")


def test_bad_classes_are_told_all_at_once():
    with pytest.raises(ConfigError, match="the one class 'owl' is there"):
        classes_of(["owl"], ("{}",), {})
    with pytest.raises(ConfigError, match="no class is there"):
        classes_of([], ("{}",), {})
    with pytest.raises(ConfigError) as caught:
        classes_of(["owl", "__"], ("{}",), {"olw": "x"})
    assert caught.value.faults == [
        "task.names: no class 'olw' in data.train; did you mean 'owl'?",
        "task.names: the class '__' has no name that can be read; give it one",
    ]


def test_classes_that_read_alike_are_warned_of(caplog):
    classes_of(["n1", "n2"], ("{}",), {"n1": "crane", "n2": "crane"})
    assert "several classes read alike" in caplog.text
    assert "'crane'" in caplog.text


def test_sets_with_classes_that_train_lacks_are_named(folder, load, tmp_path, encode):
    train = load("train", kind="classes")
    for name in ("owl", "red_foxes", "bat"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "v.jpg").write_bytes(encode("JPEG", seed=7))
    val = load("val", kind="classes")
    classes = classes_of(train.labels, ("{}",), {})
    with pytest.raises(DataError, match=r"data\.val: 2 of its classes are not in data\.train: 'bat', 'red_foxes'"):
        check_sets(classes, {"train": train, "val": val})
    with pytest.raises(DataError, match=r"data\.test\.far: 2 of its classes.*"):
        check_sets(classes, {"train": train, "far": val})
    check_sets(classes, {"train": train, "val": train})


def test_hold_out_and_fraction_keep_the_classes_that_they_take_away_known(folder, load):
    source = load("train", kind="classes")
    parts = split_source(source, {"val": 0.5}, "key", "3")
    assert parts["train"].labels == source.labels
    assert share_of_source(source, 0.4).labels == source.labels
