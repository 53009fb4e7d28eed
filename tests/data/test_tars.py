import gzip
import io
import json
import tarfile

import pandas as pd
import pytest

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.pictures import decode


def captions(source):
    return {pair.key: pair.captions for pair in source.pairs}


def reasons(source):
    return {item.key: item.reason for item in source.rejected}


def as_json(**fields):
    return json.dumps(fields).encode()


def test_webdataset_rows_are_read_in_place(tmp_path, load, write_tar, encode):
    write_tar(
        tmp_path / "shards" / "0000.tar",
        [
            ("000.jpg", encode("JPEG", seed=0)),
            ("000.txt", "ein Käfer\nzwei\n".encode()),
            ("001.PNG", encode("PNG", seed=1)),
            ("001.json", as_json(caption="from json")),
            ("sub/002.webp", encode("WEBP", seed=2)),
            ("sub/002.json", as_json(captions=["a", "b"])),
            ("sub/002.cls", b"17"),
            ("README", b"passed over"),
            ("._000.jpg", b"passed over"),
        ],
    )
    source = load("shards/0000.tar")
    assert captions(source) == {"000": ("ein Käfer", "zwei"), "001": ("from json",), "sub/002": ("a", "b")}
    assert source.rejected == ()
    picture = source.pairs[1].picture
    assert picture.data is None
    assert (picture.path, picture.origin) == (tmp_path / "shards" / "0000.tar", "shards/0000.tar/001.png")
    assert [pair.picture.read() for pair in source.pairs] == [
        encode("JPEG", seed=0), encode("PNG", seed=1), encode("WEBP", seed=2)
    ]  # fmt: skip
    assert decode(picture.read(), 1_000_000, picture.origin).size == (12, 9)


def test_members_of_a_row_need_not_stand_together_and_may_begin_with_a_dot_slash(tmp_path, load, write_tar, encode):
    """As ``tar cf x.tar .`` packs a folder: in the file system's order."""
    members = [("./a.txt", b"a"), ("./b.jpg", encode(seed=1)), ("./b.txt", b"b"), ("./a.jpg", encode(seed=2))]
    write_tar(tmp_path / "x.tar", members)
    assert captions(load("x.tar")) == {"a": ("a",), "b": ("b",)}


def test_long_member_names_are_read(tmp_path, load, write_tar, encode):
    name = "folder/" * 40 + "x" * 120
    write_tar(tmp_path / "x.tar", [(f"{name}.jpg", encode()), (f"{name}.txt", b"a")])
    assert captions(load("x.tar")) == {name: ("a",)}


def test_img2dataset_keys_come_from_its_json_and_its_parquet_beside_is_no_source(tmp_path, load, write_tar, encode):
    for shard in range(2):
        members = []
        for number in range(2):
            key = f"{shard:05d}{number:04d}"
            members += [
                (f"{key}.jpg", encode(seed=number)),
                (f"{key}.txt", f"caption {key}".encode()),
                (f"{key}.json", as_json(key=key, status="success", caption="ignored", width=12)),
            ]
        write_tar(tmp_path / "out" / f"{shard:05d}.tar", members)
        pd.DataFrame({"key": ["x", "y", "z"], "status": ["success", "success", "failed_to_download"]}).to_parquet(
            tmp_path / "out" / f"{shard:05d}.parquet"
        )
        (tmp_path / "out" / f"{shard:05d}_stats.json").write_text("{}")
    expected = {
        f"{shard:05d}{number:04d}": (f"caption {shard:05d}{number:04d}",) for shard in (0, 1) for number in (0, 1)
    }
    assert captions(load("out")) == captions(load("out/{00000..00001}.tar")) == expected
    assert list(captions(load("out"))) == list(expected)


def test_keys_that_another_shard_has_taken_are_lengthened_by_the_shard(tmp_path, load, write_tar, encode):
    for split in ("train", "val"):
        for shard in range(2):
            write_tar(tmp_path / split / f"{shard}.tar", [("000.jpg", encode()), ("000.txt", b"a")])
    taken = set()
    assert list(captions(load("train/{0..1}.tar", taken=taken))) == ["000", "1/000"]
    assert list(captions(load("val/{0..1}.tar", taken=taken))) == ["0/000", "val/1/000"]
    # The very same shard again is not a new row.
    source = load("val/0.tar", taken=taken)
    assert reasons(source) == {"000": "duplicate key: first in another split"}


def test_a_key_field_of_the_user_s_own_is_never_changed(tmp_path, load, write_tar, encode):
    for shard in range(2):
        members = [("a.jpg", encode()), ("a.json", as_json(sku=7, caption="x"))]
        write_tar(tmp_path / f"{shard}.tar", [*members, ("b.jpg", encode()), ("b.json", as_json(caption="x"))])
    source = load("{0..1}.tar", key="sku")
    assert list(captions(source)) == ["7"]
    assert [(item.key, item.reason) for item in source.rejected] == [
        ("b", "no key"),
        ("7", "duplicate key: first in 0.tar/a"),
        ("b", "no key"),
    ]


def test_named_members_and_fields_are_used(tmp_path, load, write_tar, encode):
    write_tar(
        tmp_path / "x.tar",
        [
            ("a.depth.png", encode("PNG", seed=1)),
            ("a.rgb.png", encode("PNG", seed=2)),
            ("a.txt", b"ignored"),
            ("a.alt", b"alt"),
            ("a.json", as_json(blip="blip", caption="ignored")),
        ],
    )
    source = load("x.tar", image="rgb.png", captions=("blip", "alt"))
    assert captions(source) == {"a": ("blip", "alt")}
    assert source.pairs[0].picture.read() == encode("PNG", seed=2)
    with pytest.raises(ConfigError) as caught:
        load("x.tar", image="rbg.png", captions=("blib",))
    assert caught.value.faults == [
        "data: x.tar: image: no member extension or JSON field 'rbg.png' in it; did you mean 'rgb.png'?",
        "data: x.tar: captions: no member extension or JSON field 'blib' in it; did you mean 'blip'?",
    ]


def test_texts_and_pictures_alone(tmp_path, load, write_tar, encode):
    write_tar(tmp_path / "x.tar", [("a.jpg", encode()), ("b.txt", b"only text")])
    assert captions(load("x.tar", kind="images")) == {"a": ()}
    assert captions(load("x.tar", kind="texts")) == {"b": ("only text",)}
    assert reasons(load("x.tar")) == {"a": "no caption", "b": "no picture"}


def test_rows_that_cannot_be_used_are_refused_with_the_reason(tmp_path, load, write_tar, encode):
    good = encode()
    members = [
        ("latin.jpg", good), ("latin.txt", b"caf\xe9"),
        ("torn.jpg", good), ("torn.json", b'{"caption": '),
        ("list.jpg", good), ("list.json", b"[]"),
        ("empty.jpg", b""), ("empty.txt", b"a"),
        ("text.jpg", b"not a picture at all"), ("text.txt", b"a"),
        ("huge.jpg", good), ("huge.txt", b"x" * ((1 << 20) + 1)),
        ("twice.jpg", good), ("twice.txt", b"a"), ("twice.jpg", good),
        ("../up.jpg", good), ("/abs.jpg", good),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    source = load("x.tar")
    found = reasons(source)
    assert captions(source) == {"twice": ("a",)}
    assert found.pop("torn").startswith("broken JSON member")
    assert found == {
        "latin": "caption is not UTF-8",
        "list": "broken JSON member: not an object",
        "empty": "empty file",
        "text": "not a picture (wrongly named?): none of JPEG, PNG, WEBP, GIF, BMP, TIFF",
        "huge": "text member is over 1048576 bytes",
        "twice.jpg": "duplicate key: the tar holds this member twice",
        "../up.jpg": "unsafe member name",
        "/abs.jpg": "unsafe member name",
    }


def test_links_inside_a_tar_are_refused(tmp_path, load, encode):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("a.jpg", encode()), ("a.txt", b"a")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    source = load("x.tar")
    assert list(captions(source)) == ["a"]
    assert reasons(source) == {"b.jpg": "not a plain file"}


def breaks(source):
    return [item for item in source.rejected if item.reason.startswith("truncated or corrupt tar")]


def test_a_tar_cut_anywhere_keeps_the_rows_before_the_break_and_says_where(tmp_path, load, write_tar, encode):
    members = []
    for number in range(3):
        members += [(f"{number}.jpg", encode(seed=number)), (f"{number}.txt", b"a")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    assert breaks(load("whole.tar")) == []
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = {info.name: (info.offset, info.offset_data) for info in archive}
        end = archive.offset
    cuts = {
        starts["2.jpg"][0]: 2,  # between two members: without the end mark it cannot be known to be whole
        starts["2.jpg"][0] + 100: 2,  # inside a header
        starts["2.jpg"][1] + 100: 2,  # inside a picture
        starts["2.txt"][0] + 100: 2,  # the picture is whole, its text is lost
        end: 3,
    }
    for cut, rows in cuts.items():
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        source = load("cut.tar")
        assert len(source) == rows, cut
        (fault,) = breaks(source)
        assert fault.origin == "cut.tar"
        assert fault.reason.endswith(f"of {cut}")


def test_a_tar_damaged_in_the_middle_says_so(tmp_path, load, write_tar, encode):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", encode()), ("0.txt", b"a"), ("1.jpg", encode()), ("1.txt", b"a")])
    with tarfile.open(path) as archive:
        start = archive.getmember("1.jpg").offset
    data = bytearray(path.read_bytes())
    data[start : start + 512] = b"\x55" * 512
    path.write_bytes(data)
    source = load("x.tar")
    assert list(captions(source)) == ["0"]
    (fault,) = breaks(source)
    assert fault.reason == f"truncated or corrupt tar: it breaks off after byte {start} of {len(data)}"


def test_a_file_that_is_no_tar_is_an_error_that_names_it(tmp_path, load, write_tar, encode):
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("hello " * 500)
    whole = write_tar(tmp_path / "x.tar", [("0.jpg", encode())])
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(whole.read_bytes()))
    for name in ("empty.tar", "text.tar", "zipped.tar"):
        with pytest.raises(DataError, match=rf"{name}: not a plain tar.*decompress it first"):
            load(name)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(DataError, match=r"x\.tar\.gz: a compressed tar cannot be read in place"):
        load("x.tar.gz")


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\xff" * 10 + b"\0\0", b"\x80" + b"\x7f" * 11, b"77777777777\0"])
def test_a_made_up_size_ends_the_tar_and_never_loops(size, tmp_path, load, write_tar, encode):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", encode()), ("0.txt", b"a"), ("1.jpg", encode()), ("1.txt", b"a")])
    with tarfile.open(path) as archive:
        start = archive.getmember("1.jpg").offset
    data = bytearray(path.read_bytes())
    data[start + 124 : start + 136] = size
    header = data[start : start + 512]
    checksum = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    data[start + 148 : start + 156] = b"%06o\0 " % checksum
    path.write_bytes(data)
    source = load("x.tar")
    assert list(captions(source)) == ["0"]
    assert list(source.rejected) == breaks(source)
    assert len(source.rejected) == 1
