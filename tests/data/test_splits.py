import hashlib
import itertools
import random

import pytest

from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.records import Pair, Picture, Rejection
from clipdistill.data.sources import Source
from clipdistill.data.splits import share_of_source, split_by_hash, split_source


def pair(key, caption="", data=b""):
    return Pair(key, Picture(key, data=data or key.encode()), (caption or f"text of {key}",))


PAIRS = [pair(f"key-{number}") for number in range(4000)]


def test_the_part_follows_from_the_hash_as_documented():
    parts = split_by_hash(PAIRS[:300], {"val": 0.2, "test": 0.3}, "key", "s")
    for row in PAIRS[:300]:
        place = int(hashlib.sha256(b"s\0" + row.key.encode()).hexdigest()[:16], 16) / 2**64
        expected = "test" if place < 0.3 else "val" if place < 0.5 else "train"
        assert row in parts[expected]


def test_every_pair_is_in_one_part_whatever_the_order():
    parts = split_by_hash(PAIRS, {"val": 0.1, "test": 0.2}, "key")
    shuffled = random.Random(3).sample(PAIRS, len(PAIRS))
    again = split_by_hash(shuffled, {"test": 0.2, "val": 0.1}, "key")
    assert sorted(parts) == sorted(again) == ["test", "train", "val"]
    for name, rows in parts.items():
        assert {row.key for row in rows} == {row.key for row in again[name]}
        assert rows == sorted(rows, key=lambda row: int(row.key[4:]))
    assert sum(map(len, parts.values())) == len(PAIRS)


def test_shares_are_close_to_what_was_asked():
    parts = split_by_hash(PAIRS, {"val": 0.1, "test": 0.2}, "key")
    for name, share in {"val": 0.1, "test": 0.2, "train": 0.7}.items():
        spread = (share * (1 - share) / len(PAIRS)) ** 0.5
        assert abs(len(parts[name]) / len(PAIRS) - share) < 4 * spread


def test_adding_rows_moves_none():
    few = split_by_hash(PAIRS[:1000], {"val": 0.3}, "key")
    many = split_by_hash(PAIRS, {"val": 0.3}, "key")
    assert set(few["val"]) <= set(many["val"])
    assert set(few["train"]) <= set(many["train"])


def test_another_seed_text_gives_another_division():
    one, two = (split_by_hash(PAIRS, {"val": 0.5}, "key", text)["val"] for text in ("one", "two"))
    both = len(set(one) & set(two)) / len(PAIRS)
    assert abs(both - 0.25) < 0.03


def test_equal_captions_and_equal_pictures_stay_together():
    rows = [
        pair(f"{number}", f"Text  {number % 50}" if number % 2 else f"text {number % 50} ") for number in range(500)
    ]
    parts = split_by_hash(rows, {"val": 0.4}, "caption")
    texts = [{" ".join(row.captions[0].lower().split()) for row in part} for part in parts.values()]
    assert texts[0]
    assert texts[1]
    assert not texts[0] & texts[1]
    rows = [pair(f"{number}", data=bytes([number % 50])) for number in range(500)]
    contents = [{row.picture.data for row in part} for part in split_by_hash(rows, {"val": 0.4}, "picture").values()]
    assert contents[0]
    assert contents[1]
    assert not contents[0] & contents[1]


def test_holes_are_shared_out_by_key():
    rows = [Pair(row.key, None, ()) for row in PAIRS[:200]]
    by_key = split_by_hash(rows, {"val": 0.3}, "key")
    assert split_by_hash(rows, {"val": 0.3}, "caption") == split_by_hash(rows, {"val": 0.3}, "picture") == by_key


def test_the_ends_of_the_scale():
    assert split_by_hash(PAIRS, {"val": 1.0}, "key") == {"val": PAIRS, "train": []}
    assert split_by_hash(PAIRS, {"val": 0.0}, "key") == {"val": [], "train": PAIRS}
    assert split_by_hash(PAIRS, {}, "key") == {"train": PAIRS}
    named = split_by_hash(PAIRS, {"train": 0.5, "val": 0.25}, "key")
    assert named["val"] == split_by_hash(PAIRS, {"val": 0.25}, "key")["val"]
    assert len(named["train"]) + len(named["val"]) == len(PAIRS)


@pytest.mark.parametrize("shares", [{"val": 1.1}, {"val": -0.1}, {"val": 0.6, "test": 0.6}, {"val": float("nan")}])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ConfigError, match=r"data\.hold_out"):
        split_by_hash(PAIRS[:1], shares, "key")


def test_an_unknown_field_and_an_unreadable_picture_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="key, caption or picture, got 'title'"):
        split_by_hash(PAIRS[:1], {}, "title")
    lost = Pair("a", Picture("a.jpg", path=tmp_path / "a.jpg"), ("x",))
    with pytest.raises(DataError, match=r"a\.jpg: cannot be read"):
        split_by_hash([lost], {"val": 0.5}, "picture")


def test_weights_and_rejections_travel_with_a_source():
    source = Source(
        tuple(PAIRS[:100]), tuple(float(number) for number in range(100)), (Rejection("r", "no caption", "x"),)
    )
    parts = split_source(source, {"val": 0.3}, "key")
    for name, rows in split_by_hash(PAIRS[:100], {"val": 0.3}, "key").items():
        assert list(parts[name].pairs) == rows
        assert list(parts[name].weights) == [float(PAIRS.index(row)) for row in rows]
    assert len(parts["train"].rejected) == 1
    assert parts["val"].rejected == ()


def test_a_smaller_share_is_a_part_of_every_larger_one():
    source = Source(tuple(PAIRS), tuple(float(number) for number in range(len(PAIRS))), (Rejection("x", "why", "o"),))
    parts = {share: share_of_source(source, share) for share in (0.05, 0.3, 0.31, 1.0)}
    assert parts[1.0] == source
    sizes = {share: len(part) for share, part in parts.items()}
    assert all(size == pytest.approx(4000 * share, abs=100) for share, size in sizes.items())
    kept = [{pair.key for pair in part.pairs} for part in parts.values()]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(kept))
    for part in parts.values():
        assert part.rejected == source.rejected
        assert all(source.pairs[int(weight)] == pair for pair, weight in zip(part.pairs, part.weights, strict=True))
    inside = {
        pair.key
        for pair in PAIRS
        if int(hashlib.sha256(b"data.fraction\0" + pair.key.encode()).hexdigest()[:16], 16) / 2**64 < 0.3
    }
    assert inside == kept[1]


def test_a_share_is_drawn_afresh_from_what_a_hold_out_left():
    source = Source(tuple(PAIRS), (1.0,) * len(PAIRS))
    left = split_source(source, {"val": 0.5}, "key", "17")["train"]
    assert len(share_of_source(left, 0.4)) == pytest.approx(0.4 * len(left), abs=80)
