from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from clipdistill.data.records import Picture
from clipdistill.report.strips import Hit, Strip, choose, strips_of, thumbnails


def strip(query, overlap, ranks=(1, 1), keys=None):
    hits = tuple(Hit(key, 0.5, False, False) for key in keys or (f"{query}-picture",))
    return Strip(query, hits, hits, overlap, 10, ranks)


def queries(strips):
    return [one.query for one in strips]


def test_strips_say_what_both_models_returned(retrieval):
    found = {one.query: one for one in strips_of(retrieval, "unseen")}
    assert len(found) == 40
    for query, one in found.items():
        rows = {
            row.pairing: row
            for row in retrieval.queries(set="unseen", direction="text_to_image", search="exact", query=query)
        }
        assert [hit.key for hit in one.teacher] == list(rows["teacher"].keys[:5])
        assert [hit.key for hit in one.student] == list(rows["student"].keys[:5])
        assert [hit.score for hit in one.student] == list(rows["student"].scores[:5])
        both = set(rows["teacher"].keys[:5]) & set(rows["student"].keys[:5])
        assert {hit.key for hit in one.teacher if hit.agreed} == {hit.key for hit in one.student if hit.agreed} == both
        right = f"unseen/{query.split()[0].removeprefix('thing')}"
        assert {hit.key for hit in one.teacher if hit.relevant} == {right} & set(rows["teacher"].keys[:5])
        common = len(set(rows["teacher"].keys) & set(rows["student"].keys)) / 10
        assert one.overlap == pytest.approx(common)
        assert one.ranks[1] == (rows["student"].keys.index(right) + 1 if right in rows["student"].keys else None)


def test_a_set_without_a_teacher_has_no_strips(retrieval):
    assert strips_of(retrieval, "nothing") == []


def test_best_and_worst_by_overlap():
    found = choose([strip(f"word{n}", n / 10) for n in range(10)], 3)
    assert queries(found.best) == ["word9", "word8", "word7"]
    assert queries(found.worst) == ["word0", "word1", "word2"]


def test_among_equals_a_right_student_is_best_and_a_wrong_one_worst():
    strips = [strip("a", 0.5, (1, None)), strip("b", 0.5, (1, 1)), strip("c", 0.5, (None, 1)), strip("d", 0.5, (1, 4))]
    found = choose(strips, 2)
    assert found.best[0].query in ("b", "c")
    assert queries(found.best)[1] in ("b", "c")
    assert queries(found.worst) == ["a", "d"]


def test_ties_do_not_depend_on_the_order_of_the_queries():
    strips = [strip(f"name{n}", 0.5) for n in range(30)]
    assert choose(strips, 4) == choose(strips[::-1], 4)
    assert queries(choose(strips, 4).best) != [f"name{n}" for n in range(4)]


def test_queries_that_say_the_same_are_passed_over():
    alike = [strip(f"nerd face {n}", 1.0 - n / 100) for n in range(6)]
    others = [strip("red apple", 0.5), strip("old house", 0.4)]
    low = [strip(word, 0.1) for word in ("sea", "tree", "moon", "kite")]
    found = choose([*alike, *others, *low], 3)
    assert queries(found.best) == ["nerd face 0", "red apple", "old house"]


def test_queries_with_the_same_pictures_are_passed_over():
    keys = [f"k{n}" for n in range(5)]
    strips = [strip("one", 1.0, keys=keys), strip("two", 0.9, keys=keys), strip("three", 0.8), strip("four", 0.1)]
    assert queries(choose(strips, 2).best) == ["one", "three"]


def test_where_all_are_alike_they_are_shown_all_the_same():
    found = choose([strip(f"nerd face {n}", n / 10) for n in range(6)], 3)
    assert queries(found.best) == ["nerd face 5", "nerd face 4", "nerd face 3"]
    assert queries(found.worst) == ["nerd face 0", "nerd face 1", "nerd face 2"]


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7])
def test_no_query_is_best_and_worst_at_once(number):
    found = choose([strip(f"w{n}", n / 10) for n in range(number)], 6)
    both = queries(found.best) + queries(found.worst)
    assert len(both) == len(set(both)) == number


def test_none_are_chosen_where_none_are_asked_for():
    found = choose([strip("a", 0.1), strip("b", 0.2)], 0)
    assert (found.best, found.worst) == ((), ())


def test_thumbnails_are_small_pictures_in_themselves(pictures):
    uri = thumbnails(["test/1"], pictures)["test/1"]
    kind, data = uri.split(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (96, 72)
        wanted = Image.open(io.BytesIO(pictures["test/1"].data)).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(image.convert("RGB").getpixel((40, 40)), wanted, strict=True)) < 12


def test_a_picture_that_is_missing_or_broken_has_no_thumbnail(pictures, tmp_path):
    pictures["broken"] = Picture("broken", b"not a picture")
    pictures["cut"] = Picture("cut", pictures["test/1"].data[:60])
    pictures["gone"] = Picture("gone", path=tmp_path / "gone.png")
    assert list(thumbnails(["broken", "test/2", "cut", "gone", "unknown", "test/2"], pictures)) == ["test/2"]
