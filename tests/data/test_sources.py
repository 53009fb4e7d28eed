import json
from pathlib import Path

import pytest

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.inputs import expand
from clipdistill.data.records import Pair, Picture, Rejection
from clipdistill.data.sources import Source, SourceSpec, check_rejections, load_source, write_rejections


@pytest.fixture
def tables(tmp_path, encode):
    (tmp_path / "a.jpg").write_bytes(encode())
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"key,filepath,title\n{name}1,a.jpg,x\n{name}2,a.jpg,y\n")


def names(paths, base):
    return [path.relative_to(base).as_posix() for path in paths]


def test_brace_ranges_and_lists_expand_in_order(tmp_path):
    for name in ("0008", "0009", "0010", "0011", "x", "y"):
        (tmp_path / f"{name}.tar").touch()
    assert names(expand("{0008..0011}.tar", tmp_path), tmp_path) == ["0008.tar", "0009.tar", "0010.tar", "0011.tar"]
    assert names(expand("{0010..0009}.tar", tmp_path), tmp_path) == ["0010.tar", "0009.tar"]
    assert names(expand("{y,x}.tar", tmp_path), tmp_path) == ["y.tar", "x.tar"]


def test_two_braces_expand_like_the_shell_s(tmp_path):
    for a in "xy":
        for b in ("1", "2"):
            (tmp_path / f"{a}{b}").touch()
    assert names(expand("{y,x}{1..2}", tmp_path), tmp_path) == ["y1", "y2", "x1", "x2"]


def test_ranges_without_leading_noughts_are_not_padded(tmp_path):
    for number in (9, 10):
        (tmp_path / f"{number}.tar").touch()
    assert names(expand("{9..10}.tar", tmp_path), tmp_path) == ["9.tar", "10.tar"]


def test_a_missing_shard_of_a_range_is_named(tmp_path):
    (tmp_path / "0000.tar").touch()
    (tmp_path / "0002.tar").touch()
    with pytest.raises(DataError, match=r"no such file or folder: .*0001\.tar; did you mean"):
        expand("{0000..0002}.tar", tmp_path)


def test_globs_are_sorted_and_a_name_that_exists_is_taken_as_it_is(tmp_path):
    for name in ("b.tar", "a.tar", ".c.tar", "x[1].tar", "{1,2}.tar"):
        (tmp_path / name).touch()
    assert names(expand("?.tar", tmp_path), tmp_path) == ["a.tar", "b.tar"]
    assert names(expand("x[1].tar", tmp_path), tmp_path) == ["x[1].tar"]
    assert names(expand("{1,2}.tar", tmp_path), tmp_path) == ["{1,2}.tar"]
    assert names(expand(str(tmp_path / "a*"), tmp_path / "elsewhere"), tmp_path) == ["a.tar"]
    with pytest.raises(DataError, match="nothing matches"):
        expand("{a,z}*.tar", tmp_path)


def test_a_missing_file_names_itself_and_its_nearest_neighbour(tmp_path):
    (tmp_path / "captions.csv").touch()
    with pytest.raises(DataError, match=r"caption\.csv: no such file or folder: .*did you mean 'captions\.csv'"):
        expand("caption.csv", tmp_path)
    with pytest.raises(DataError, match="its folder is missing as well"):
        expand("no/caption.csv", tmp_path)


def test_an_endless_range_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="more than 1000000 names"):
        expand("{0..99999999999}.tar", tmp_path)


def test_formats_that_are_unknown_or_cannot_be_told(tables, load, tmp_path):
    with pytest.raises(ConfigError, match="unknown format 'parket'; did you mean 'parquet'"):
        load("a.csv", format="parket")
    (tmp_path / "data.bin").touch()
    with pytest.raises(ConfigError, match=r"data\.bin: no format is known by this name; set format"):
        load("data.bin")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no \.tar file in this folder"):
        load("folder", format="tar")
    with pytest.raises(DataError, match="folder: it holds no rows"):
        load("folder")


def test_a_format_can_be_forced(tables, load, tmp_path):
    (tmp_path / "a.csv").rename(tmp_path / "a.data")
    assert len(load("a.data", format="csv")) == 2


def test_sources_follow_each_other_with_their_weights(tables, load):
    source = load(SourceSpec(path="b.csv", weight=2.5), SourceSpec(path="a.csv"))
    assert [pair.key for pair in source.pairs] == ["b1", "b2", "a1", "a2"]
    assert source.weights == (2.5, 2.5, 1.0, 1.0)
    assert len(source) == 4
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="weight must be above 0"):
            load(SourceSpec(path="a.csv", weight=weight))


def test_no_sources_are_no_rows(load):
    assert len(load()) == 0


def test_a_key_is_taken_once_over_all_splits_and_names_where(tables, load):
    taken = set()
    load("a.csv", taken=taken)
    assert {"a1", "a2"} <= taken
    again = load("a.csv", "b.csv", taken=taken)
    assert [(item.key, item.reason) for item in again.rejected] == [
        ("a1", "duplicate key: first in another split"),
        ("a2", "duplicate key: first in another split"),
    ]
    both = load("a.csv", "a.csv")
    assert both.rejected[1] == Rejection("a2", "duplicate key: first in a.csv[1]", "a.csv[1]")


def test_made_keys_do_not_depend_on_where_the_run_is_started(tmp_path, encode, monkeypatch):
    for name in ("p/x/1.jpg", "q/x/1.jpg", "q/p/x/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(encode())
    found = []
    for base in (tmp_path, tmp_path / "p"):
        monkeypatch.chdir(base)
        specs = [SourceSpec(path=str(tmp_path / name)) for name in ("p/x", "q/x", "q/p/x")]
        source = load_source(specs, base=Path(), max_pixels=1000, kind="images")
        found.append([pair.key for pair in source.pairs])
    assert found == [["x/1.jpg", "q/x/1.jpg", "p/x/1.jpg"]] * 2


def test_the_same_file_by_two_names_is_one_row(tmp_path, load, encode):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.jpg").write_bytes(encode())
    source = load("x", "x/../x/*.jpg", kind="images")
    assert len(source) == 1
    assert [item.reason for item in source.rejected] == ["duplicate key: first in x/1.jpg"]


def test_a_refused_row_does_not_take_its_key(tmp_path, load, encode):
    (tmp_path / "a.jpg").write_bytes(encode())
    (tmp_path / "a.csv").write_text("key,filepath,title\nk,gone.jpg,x\nk,a.jpg,y\n")
    source = load("a.csv")
    assert [(pair.key, pair.captions) for pair in source.pairs] == [("k", ("y",))]
    assert [item.reason for item in source.rejected] == ["missing file"]


def test_the_limit_on_pixels_is_applied(tables, load):
    assert len(load("a.csv", max_pixels=108)) == 2
    source = load("a.csv", max_pixels=107)
    assert {item.reason for item in source.rejected} == {"too many pixels: 12x9 is over data.max_pixels 107"}


def test_the_fingerprint_follows_keys_captions_sizes_and_order(tables, load, tmp_path, encode):
    first = load("a.csv", "b.csv").fingerprint
    assert first == load("a.csv", "b.csv").fingerprint
    assert first != load("b.csv", "a.csv").fingerprint
    (tmp_path / "a.jpg").write_bytes(encode(size=(40, 40)))
    assert first != load("a.csv", "b.csv").fingerprint


def source_of(*pairs):
    return Source(tuple(pairs), (1.0,) * len(pairs))


def test_the_fingerprint_tells_apart_what_could_be_written_alike():
    picture = Picture("a", data=b"123")
    rows = [
        (Pair("k", picture, ("a", "b")),),
        (Pair("k", picture, ("ab",)),),
        (Pair("k", picture, ("b", "a")),),
        (Pair("k", None, ("a", "b")),),
        (Pair("k", Picture("a", data=b"1234"), ("a", "b")),),
        (Pair("k", picture, ("a",)), Pair("b", None, ())),
    ]
    assert len({source_of(*row).fingerprint for row in rows}) == len(rows)
    moved = source_of(Pair("k", Picture("elsewhere", data=b"123"), ("a", "b")))
    assert moved.fingerprint == source_of(*rows[0]).fingerprint


def test_a_source_needs_a_weight_for_each_pair():
    with pytest.raises(ValueError, match="1 pairs, 0 weights"):
        Source((Pair("k", None, ("a",)),), ())


def test_rejections_are_written_in_a_stable_order(tmp_path):
    items = [
        Rejection("k2", "no caption", "b.csv[0]"),
        Rejection("ключ", "no picture", "a.csv[1]"),
        Rejection("k1", "empty file", "a.csv[0]"),
    ]
    write_rejections(tmp_path / "one.jsonl", items)
    write_rejections(tmp_path / "two.jsonl", reversed(items))
    data = (tmp_path / "one.jsonl").read_bytes()
    assert data == (tmp_path / "two.jsonl").read_bytes()
    rows = [json.loads(line) for line in data.decode("utf-8").splitlines()]
    assert rows == [
        {"key": "k1", "reason": "empty file", "origin": "a.csv[0]"},
        {"key": "ключ", "reason": "no picture", "origin": "a.csv[1]"},
        {"key": "k2", "reason": "no caption", "origin": "b.csv[0]"},
    ]


def test_rejections_of_undecodable_names_can_be_written(tmp_path, load):
    (tmp_path / "a.tsv").write_bytes(b"key\tfilepath\ttitle\n\xff\tgone\xfe.jpg\tx\n")
    source = load("a.tsv")
    write_rejections(tmp_path / "rejected.jsonl", source.rejected)
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["key"] == "\\udcff"


@pytest.mark.parametrize(
    ("count", "total", "allowed", "fails"),
    [
        (0, 0, 0.0, False),
        (0, 10, 0.0, False),
        (1, 10, 0.0, True),
        (10, 100, 0.1, False),
        (11, 100, 0.1, True),
        (1, 5, 1.0, False),
        (5, 5, 5.0, False),
        (2, 1000, 1.0, True),
        (3, 3, 0.99, True),
    ],
)
def test_rejections_fail_the_run_above_a_share_or_a_count(count, total, allowed, fails):
    if fails:
        with pytest.raises(DataError):
            check_rejections(count, total, allowed, "rejected.jsonl")
    else:
        check_rejections(count, total, allowed, "rejected.jsonl")


def test_the_failure_names_both_numbers_the_commonest_reasons_and_the_list():
    items = [
        Rejection("a", "too many pixels: 9x9 is over 4", "x"),
        Rejection("b", "too many pixels: 8x8 is over 4", "x"),
    ]
    items += [Rejection("c", "empty file", "x")]
    with pytest.raises(DataError) as caught:
        check_rejections(3, 200, 0.01, "runs/x/rejected.jsonl", items)
    assert str(caught.value) == (
        "3 of 200 rows were refused, and data.max_rejected allows 0.01 of the rows, 2: "
        "too many pixels (2), empty file (1). They are listed in runs/x/rejected.jsonl; mend them, or raise "
        "data.max_rejected."
    )
