import json

import numpy as np

from clipdistill.data.records import Pair, Picture, Rejection
from clipdistill.data.sources import Source
from clipdistill.data.survey import Spread, spread, survey


def test_a_spread_is_numpy_s():
    values = [int(value) for value in np.random.default_rng(0).integers(0, 1000, 37)]
    for part in (values, values[:36], values[:1], values[:2]):
        expected = Spread(
            min(part), float(np.median(part)), int(np.percentile(part, 95, method="inverted_cdf")), max(part)
        )
        assert spread(part) == expected
    assert spread([]) is None


def make(encode, tmp_path):
    (tmp_path / "b.png").write_bytes(encode("PNG", size=(20, 30), seed=1))
    small = encode("PNG", size=(10, 5))
    pairs = (
        Pair("a", Picture("a", data=small), ("a red bicycle", "bicycle")),
        Pair("b", Picture("b", path=tmp_path / "b.png"), ("bicycle",)),
        Pair("c", Picture("c", data=small), ("über",)),
        Pair("d", None, ("only a text here",)),
        Pair("e", Picture("e", data=encode("PNG", size=(12, 40), seed=2)), ()),
        Pair("f", Picture("f", path=tmp_path / "gone.png"), ("gone",)),
    )
    rejected = tuple(Rejection(f"r{number}", f"too many pixels: {number}", "x") for number in range(30))
    return Source(pairs, (1.0,) * len(pairs), (*rejected, Rejection("s", "empty file", "x")))


def test_a_survey_counts_what_is_there(encode, tmp_path):
    source = make(encode, tmp_path)
    found = survey(source)
    assert (found.rows, found.pictures, found.captions, found.unique_texts) == (6, 5, 6, 5)
    assert found.captions_a_row == {0: 1, 1: 4, 2: 1}
    assert (found.sampled_pictures, found.unreadable_pictures) == (5, 1)
    assert found.width == Spread(10, 11.0, 20, 20)
    assert found.height == Spread(5, 17.5, 40, 40)
    assert found.pixels == Spread(50, 265.0, 600, 600)
    sizes = sorted(len(pair.picture.read()) for pair in source.pairs if pair.key in "abce")
    assert found.picture_bytes == Spread(sizes[0], (sizes[1] + sizes[2]) / 2, sizes[3], sizes[3])
    assert found.caption_words == Spread(1, 1.0, 4, 4)
    assert found.caption_characters == Spread(4, 7.0, 16, 16)
    assert (found.duplicate_pictures, found.duplicate_texts) == (1, 1)
    assert found.rejected == {"too many pixels": 30, "empty file": 1}
    assert [item.key for item in found.rejected_rows] == [f"r{number}" for number in range(20)]
    assert found.fingerprint == source.fingerprint


def test_pictures_of_equal_size_but_other_bytes_are_no_duplicates():
    one = b"\x89PNG\r\n\x1a\n" + b"1" * 20
    pairs = tuple(Pair(str(number), Picture(str(number), data=one + bytes([number])), ("x",)) for number in range(3))
    assert survey(Source(pairs, (1.0,) * 3)).duplicate_pictures == 0


def test_a_sample_is_spread_evenly_and_stated(encode):
    pairs = tuple(
        Pair(str(number), Picture(str(number), data=encode("PNG", size=(number + 1, 1))), ("x",))
        for number in range(10)
    )
    found = survey(Source(pairs, (1.0,) * 10), sample=5)
    assert (found.pictures, found.sampled_pictures) == (10, 5)
    assert found.width == Spread(1, 5.0, 9, 9)


def test_a_survey_is_plain_json(encode, tmp_path):
    value = survey(make(encode, tmp_path)).to_json()
    assert json.loads(json.dumps(value)) == value
    assert value["captions_a_row"] == {"0": 1, "1": 4, "2": 1}
    assert value["rejected_rows"][0] == {"key": "r0", "reason": "too many pixels: 0", "origin": "x"}
    assert value["width"]["median"] == 11.0


def test_an_empty_source_can_be_surveyed():
    found = survey(Source((), ()))
    assert (found.rows, found.width, found.caption_words, found.captions_a_row) == (0, None, None, {})
