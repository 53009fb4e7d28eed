from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from clipdistill.core.errors import MismatchError
from clipdistill.data.records import Picture
from clipdistill.report.html import render, write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}
EVIL = "<script>alert(1)</script>\"><img src=x onerror=alert(2)>'{{ 7*7 }}\x00\x1b[31m"


class Page(HTMLParser):
    """The page's elements; it fails where one is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(" ".join(data.split()))

    def values(self, name, tag=None):
        return [value for found, key, value in self.attributes if key == name and tag in (None, found)]

    def text(self):
        return " ".join(word for word in self.words if word)


@pytest.fixture(scope="module")
def text(whole_report, whole_metrics, whole_pictures):
    """The page of the whole run: made once, as it takes a second."""
    return render(whole_report, whole_metrics, whole_pictures, strips=3)


def rendered(report, metrics, pictures, strips=2):
    return render(report, metrics, pictures, strips=strips)


def assert_inert(page, text):
    assert not {"script", "iframe", "object", "embed", "link", "img", "form", "base"} & set(page.tags)
    assert [name for _, name, _ in page.attributes if name.startswith("on")] == []
    assert [value for value in page.values("href") if not value.startswith("#")] == []
    assert page.values("src") == []
    assert re.search(r"https?://|@import|javascript:|\bsrcset\b", text) is None
    assert {url.split(",")[0] for url in re.findall(r"url\(\"?([^#)\"][^)]*)", text)} <= {"data:image/webp;base64"}
    policy = [value for value in page.values("content", "meta") if "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_is_whole_and_needs_nothing_from_outside(text):
    page = Page(text)
    assert_inert(page, text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.tags.count("h1") == 1
    assert set(page.values("href", "a")) == {f"#{name}" for name in page.values("id", "section")}
    ids = page.values("id")
    assert len(ids) == len(set(ids))


def test_every_part_is_there(text):
    found = Page(text).text()
    for words in (
        "The student keeps",
        "of the teacher's success@10 on “unseen”",
        "40 text queries, each against 20 pictures",
        "student's queries, teacher's vectors",
        "Where recall is lost",
        "unseen: text → picture, success@10",
        "success@10 against parameters",
        "Training loss",
        "Most agreement",
        "Least agreement",
        "big-model",
        "1,234",
        "2.14.0",
        "ab" * 32,
        "the teacher",
        "5 rows rejected",
    ):
        assert words in found, words
    assert text.count("<svg") == 4 + 1 + 3, "recall budgets of two sets in two directions, sizes, training"
    assert text.count("<caption>") == text.count("<table")


def test_retention_stands_with_its_interval_and_what_is_missing_as_na(report, text):
    row = next(
        row
        for row in report["evaluation"]["rows"]
        if (row["set"], row["direction"], row["pairing"], row["search"], row["measure"], row["k"])
        == ("unseen", "text_to_image", "student", "exact", "retention", 10)
    )
    value, low, high = (100 * row[name] for name in ("value", "low", "high"))
    assert f"<td>{value:.1f}% <small>[{low:.1f}, {high:.1f}]</small></td>" in text
    assert '<td class="none">n/a</td>' in text


def test_every_shown_picture_has_one_thumbnail_and_words(text):
    page = Page(text)
    shown = [value for value in page.values("class", "span") if re.search(r"\bp\d+$", value)]
    assert len(shown) == 2 * 2 * 3 * 10, "two sets, best and worst, three queries, five pictures of each model"
    used = {value.split()[-1] for value in shown}
    defined = re.findall(r"^\.(p\d+)\{background-image:url\(\"data:image/webp;base64,", text, re.MULTILINE)
    assert sorted(defined) == sorted(used)
    labels = page.values("aria-label", "span")
    assert len(labels) == len(shown)
    assert any(
        re.fullmatch(r"unseen/\d+: relevant, also among the student's first, score -?0\.\d{3}", x) for x in labels
    )
    assert sum("also among" in label for label in labels) == sum("agreed" in value for value in shown)
    assert text.count('class="check" aria-hidden') == sum("agreed" in value for value in shown)
    assert len(text) < 2_000_000


def test_a_picture_that_is_missing_or_broken_gets_a_placeholder(report, pictures, text):
    assert "picture not available" not in text
    broken = {key: Picture(key, b"no picture") for key in pictures if key.startswith("unseen")}
    text = rendered(report, [], broken)
    assert_inert(Page(text), text)
    assert text.count("absent") >= 2 * 2 * 2 * 10
    assert re.search(r'<span class="key">unseen/\d+</span>', text)
    assert "data:image" not in text


def test_hostile_words_stay_words(report, metrics, pictures):
    evil = json.dumps(report).replace("big-model", "EVIL").replace("thing7 of", "EVIL of").replace("unseen", "uns EVIL")
    evil = json.loads(evil, object_pairs_hook=lambda pairs: {k.replace("EVIL", EVIL): _evil(v) for k, v in pairs})
    evil["name"], evil["libraries"], evil["student_fingerprint"] = EVIL, {EVIL: EVIL}, EVIL
    hostile = {key.replace("unseen", f"uns {EVIL}"): value for key, value in pictures.items()}
    lines = [{**line, "terms": {EVIL: 1.0}} for line in metrics]
    text = rendered(evil, lines, hostile, strips=20)
    page = Page(text)
    assert_inert(page, text)
    assert "alert(1)" in page.text()
    assert "{{ 7*7 }}" in page.text()
    assert re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text) is None


def _evil(value):
    if isinstance(value, list):
        return [_evil(item) for item in value]
    return value.replace("EVIL", EVIL) if isinstance(value, str) else value


def test_endless_captions_are_cut(report, pictures):
    for row in report["evaluation"]["per_query"]:
        row["query"] = row["query"] + " endless" * 5000
    text = rendered(report, [], pictures)
    assert "endless…" in text
    assert len(text) < 200_000


def test_half_a_surrogate_pair_does_not_stop_the_page(report, pictures, tmp_path):
    report["name"] = "half \ud83d of one"
    write_report(tmp_path / "report.html", report, [], pictures, strips=0)
    assert "half ? of one" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_same_inputs_give_the_same_bytes(report, metrics, pictures, text, tmp_path):
    stored = json.loads(json.dumps(report, sort_keys=True))
    write_report(tmp_path / "report.html", stored, metrics, dict(reversed(pictures.items())), strips=3)
    assert (tmp_path / "report.html").read_bytes() == text.encode("utf-8")


def test_a_page_can_be_made_of_next_to_nothing(report):
    empty = {"schema": report["evaluation"]["schema"], "rows": [], "per_query": [], "protocol": []}
    text = rendered({"name": "bare", "evaluation": empty}, [], {})
    page = Page(text)
    assert_inert(page, text)
    for words in ("Nothing was evaluated.", "no training metrics were recorded", "no text query was answered"):
        assert words in page.text()


def test_a_teacher_that_is_not_at_hand(report, pictures):
    report["sizes"]["teacher"] = {"name": "stored", "dim": 16}
    del report["speeds"]["teacher"]
    text = rendered(report, [], pictures)
    assert_inert(Page(text), text)
    assert re.search(r">teacher 0\.\d{3}  unseen<", text)
    assert "fewer parameters" not in text


def test_no_strips_where_none_are_asked_for(report, pictures):
    text = rendered(report, [], pictures, strips=0)
    assert "data:image" not in text
    assert "<code>report.strips</code> is 0" in text


def test_nothing_given_is_changed(report, metrics, pictures):
    before = copy.deepcopy((report, metrics))
    rendered(report, metrics, pictures, strips=1)
    assert (report, metrics) == before


def test_a_report_of_another_schema_is_refused(report, metrics, pictures):
    report["evaluation"]["schema"] = "something/9"
    with pytest.raises(MismatchError, match="something/9"):
        rendered(report, metrics, pictures)


def test_rows_that_a_fraction_leaves_out_are_counted(whole_report, whole_metrics, whole_pictures, text):
    report = {**whole_report, "data": {**whole_report["data"], "unused": 4321}}
    page = Page(render(report, whole_metrics, whole_pictures, strips=0))
    assert "4,321 of train unused (data.fraction)" in page.text()
    assert "unused" not in Page(text).text()
