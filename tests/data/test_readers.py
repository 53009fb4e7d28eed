import json

import pytest

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.sources import SourceSpec


def captions(source):
    return {pair.key: pair.captions for pair in source.pairs}


def reasons(source):
    return {item.key: item.reason for item in source.rejected}


@pytest.fixture
def folder(tmp_path, encode):
    top = tmp_path / "photos"
    (top / "cats").mkdir(parents=True)
    (top / "a.jpg").write_bytes(encode("JPEG"))
    (top / "a.txt").write_text("a red bicycle\n\n  a bicycle, red  \r\n", encoding="utf-8")
    (top / "cats" / "b.PNG").write_bytes(encode("PNG"))
    (top / "cats" / "b.txt").write_text("\ufeffein Käfer", encoding="utf-8")
    (top / "cats" / "c.d.webp").write_bytes(encode("WEBP"))
    (top / "cats" / "c.d.txt").write_text("dotted")
    return top


def test_an_image_folder_gives_pictures_with_the_lines_of_their_texts(folder, load, encode):
    source = load("photos")
    assert captions(source) == {
        "photos/a.jpg": ("a red bicycle", "a bicycle, red"),
        "photos/cats/b.PNG": ("ein Käfer",),
        "photos/cats/c.d.webp": ("dotted",),
    }
    assert [pair.key for pair in source.pairs] == sorted(captions(source))
    assert source.rejected == ()
    assert source.pairs[0].picture.read() == encode("JPEG")
    assert source.pairs[0].picture.origin == "photos/a.jpg"


def test_a_folder_without_texts_is_unpaired_pictures(folder, load):
    (folder / "cats" / "b.txt").unlink()
    assert reasons(load("photos")) == {"photos/cats/b.PNG": "no caption"}
    source = load("photos", kind="images")
    assert captions(source) == {"photos/a.jpg": (), "photos/cats/b.PNG": (), "photos/cats/c.d.webp": ()}


def test_a_folder_s_texts_alone_are_unpaired_texts(folder, load):
    (folder / "a.jpg").write_bytes(b"broken, which does not matter here")
    source = load("photos", kind="texts")
    assert [pair.picture for pair in source.pairs] == [None] * 3
    assert len(source.pairs[0].captions) == 2


def test_what_cannot_be_used_in_a_folder_is_refused_by_name(folder, load, encode):
    (folder / "cats" / "b.txt").write_bytes(b"caf\xe9")
    (folder / "cats" / "c.d.txt").write_text("  \n\n")
    (folder / "empty.jpg").touch()
    (folder / "empty.txt").write_text("a")
    (folder / "alone.txt").write_text("a text without a picture")
    (folder / "raw.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "raw.txt").write_text("a")
    (folder / ".hidden.jpg").write_bytes(b"passed over")
    (folder / "notes.md").write_text("passed over")
    assert reasons(load("photos")) == {
        "photos/cats/b.PNG": "caption is not UTF-8",
        "photos/cats/c.d.webp": "no caption",
        "photos/empty.jpg": "empty file",
        "photos/alone.txt": "no picture: none has this text's name",
        "photos/raw.heic": "not a picture (wrongly named?): none of JPEG, PNG, WEBP, GIF, BMP, TIFF",
    }


def test_symbolic_links_are_followed_only_inside_the_folder(folder, load, tmp_path, encode):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(encode())
    (folder / "link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "more").symlink_to(outside)
    (folder / "again.jpg").symlink_to(folder / "a.jpg")
    (folder / "same-cats").symlink_to(folder / "cats")
    source = load("photos", kind="images")
    assert reasons(source) == dict.fromkeys(("photos/link.jpg", "photos/more"), "symbolic link out of the folder")
    assert len(source) == 4


def test_a_caption_file_may_not_lead_outside_or_be_huge(folder, load, tmp_path):
    (tmp_path / "passwords").write_text("secret")
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(tmp_path / "passwords")
    (folder / "cats" / "b.txt").write_bytes(b"x" * (1 << 20) + b"x")
    assert reasons(load("photos")) == {
        "photos/a.jpg": "symbolic link out of the folder",
        "photos/cats/b.PNG": "caption file is over 1048576 bytes",
    }


def test_single_pictures_come_by_a_glob_with_their_texts(folder, load):
    source = load("photos/**/*.[PJpj]*[Gg]")
    assert captions(source) == {
        "photos/a.jpg": ("a red bicycle", "a bicycle, red"),
        "cats/b.PNG": ("ein Käfer",),
    }


def test_folders_of_equal_inner_names_do_not_clash(tmp_path, load, encode):
    for top in ("x/train", "y/train"):
        (tmp_path / top).mkdir(parents=True)
        (tmp_path / top / "1.jpg").write_bytes(encode())
    taken = set()
    first = load("x/train", kind="images", taken=taken)
    second = load("y/train", kind="images", taken=taken)
    assert [first.pairs[0].key, second.pairs[0].key] == ["train/1.jpg", "y/train/1.jpg"]


def test_a_text_file_holds_a_text_a_line(tmp_path, load):
    (tmp_path / "words.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \n\xff\nthree")
    source = load("words.txt", kind="texts")
    assert captions(source) == {"words/0": ("one",), "words/2": ("two",), "words/4": ("three",)}
    assert reasons(source) == {"words/3": "caption is not UTF-8"}
    assert source.rejected[0].origin == "words.txt[3]"
    with pytest.raises(ConfigError, match=r"words\.txt.*texts only.*data\.texts"):
        load("words.txt")


@pytest.fixture
def karpathy(tmp_path, encode):
    (tmp_path / "val2014").mkdir()
    images = []
    for number, split in enumerate(["train", "restval", "val", "test"]):
        name = f"{number}.jpg"
        (tmp_path / "val2014" / name).write_bytes(encode(seed=number))
        sentences = [{"raw": f"picture {number}", "tokens": []}, {"raw": f"again {number}", "tokens": []}]
        images.append(
            {"filepath": "val2014", "filename": name, "split": split, "cocoid": 100 + number, "imgid": number,
             "sentences": sentences}
        )  # fmt: skip
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return images


def test_karpathy_splits_are_read_and_restval_is_train(karpathy, load):
    train = load("dataset_coco.json", split="train")
    assert captions(train) == {"100": ("picture 0", "again 0"), "101": ("picture 1", "again 1")}
    assert list(captions(load("dataset_coco.json", format="karpathy", split="val"))) == ["102"]
    assert list(captions(load("dataset_coco.json", split="restval"))) == ["101"]
    assert len(load("dataset_coco.json")) == 4


def test_karpathy_paths_start_from_root_and_may_lack_a_folder(karpathy, load, tmp_path):
    (tmp_path / "lists").mkdir()
    for record in karpathy:
        del record["filepath"], record["cocoid"]
    (tmp_path / "lists" / "flickr.json").write_text(json.dumps({"images": karpathy}))
    source = load("lists/flickr.json", split="test", root="val2014")
    assert captions(source) == {"3": ("picture 3", "again 3")}


def test_an_unknown_karpathy_split_names_the_nearest(karpathy, load):
    with pytest.raises(ConfigError, match="no row of split 'tets'; did you mean 'test'"):
        load("dataset_coco.json", split="tets")


def test_karpathy_rows_without_picture_or_sentence_are_refused(karpathy, load, tmp_path):
    karpathy[0]["sentences"] = []
    del karpathy[1]["filename"]
    karpathy[2]["filename"] = "gone.jpg"
    karpathy[3]["sentences"] = [{"raw": 7}]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": karpathy}))
    assert reasons(load("dataset_coco.json")) == {
        "100": "no caption",
        "101": "no picture",
        "102": "missing file",
        "103": "caption is not a text: int",
    }


def test_coco_captions_are_joined_to_their_pictures(tmp_path, load, encode):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for number in (5, 6):
        (tmp_path / "val2017" / f"{number:012d}.jpg").write_bytes(encode(seed=number))
    document = {
        "images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (5, 6)],
        "annotations": [
            {"id": 1, "image_id": 6, "caption": "six\n"},
            {"id": 2, "image_id": 5, "caption": "five"},
            {"id": 3, "image_id": 6, "caption": "half a dozen"},
            {"id": 4, "image_id": 9, "caption": "nobody's"},
        ],
    }
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(document))
    source = load("annotations/captions_val2017.json", root="val2017")
    assert captions(source) == {"5": ("five",), "6": ("six", "half a dozen")}
    assert reasons(source) == {"9": "no picture: captions of an image_id that the file does not list"}
    assert captions(load("annotations/captions_val2017.json", format="coco", root="val2017")) == captions(source)
    with pytest.raises(ConfigError, match="has no splits"):
        load("annotations/captions_val2017.json", root="val2017", split="val")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a JSON file"), ("[1]", "no list of objects named 'images'"), ('{"images": 3}', "no list of objects")],
)
def test_a_json_file_of_another_shape_is_an_error_that_names_it(text, message, tmp_path, load):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(DataError, match=rf"other\.json.*{message}"):
        load("other.json")


def test_options_that_a_format_does_not_have_are_named(folder, load):
    with pytest.raises(ConfigError, match="photos: format folder has no option captions, split"):
        load(SourceSpec(path="photos", captions=("title",), split="val"))
