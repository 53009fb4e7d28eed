import io
import json
import math

import numpy as np
import oracles_retrieval as slow
import pytest
from oracles_retrieval import ToyEncoder

from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Pair, Picture
from clipdistill.evaluation import (
    Embedded,
    RetrievalReport,
    evaluate,
    evaluate_embedded,
    evaluate_query_side,
    judged,
)


def pair(key, captions, data=None):
    return Pair(key, Picture(origin=key, data=(data or key).encode()), tuple(captions))


def toy_pairs(concepts=30, styles=2, captions=2):
    """Pictures of concepts in styles; the first caption is shared by the concept's pictures, the others are not."""
    return [
        pair(f"c{c}/{s}", [f"c{c}", *(f"c{c}/{s}.{n}" for n in range(1, captions))])
        for c in range(concepts)
        for s in range(styles)
    ]


TEACHER, STUDENT = ToyEncoder(0.7, seed=0), ToyEncoder(1.4, seed=0)


@pytest.fixture(scope="module")
def report():
    return evaluate(STUDENT, toy_pairs(), teacher=TEACHER, index="IVF4,Flat", seed=3)


def test_a_text_is_relevant_to_every_picture_that_carries_it():
    picture = Picture("x", b"x")
    rows = judged(
        "test",
        [
            Pair("a", picture, ("dog", "a dog", "dog")),
            Pair("t", None, ("lonely", "cat")),
            Pair("b", picture, ("cat", "dog")),
            Pair("c", picture, ()),
        ],
    )
    assert rows.keys == ("a", "b", "c")
    assert rows.texts == ("dog", "a dog", "lonely", "cat")
    assert rows.relevant_pictures == ((0, 1), (0,), (), (1,))
    assert rows.relevant_texts == ((0, 1), (3, 0), ())
    with pytest.raises(DataError, match="'a' occurs twice"):
        judged("test", [Pair("a", picture, ()), Pair("a", picture, ())])


def wanted_values(encoder, asking=None):
    """Slow success and recall of both directions, by dense scores."""
    rows = judged("test", toy_pairs())
    images, texts = encoder.encode_images(rows.pictures), (asking or encoder).encode_texts(rows.texts)
    forward = [[row for row, _ in found] for found in slow.slow_top_k(texts, images, 10)]
    back = [
        [row for row, _ in found]
        for found in slow.slow_top_k(
            (asking or encoder).encode_images(rows.pictures), encoder.encode_texts(rows.texts), 10
        )
    ]
    return {
        "text_to_image": (forward, rows.relevant_pictures),
        "image_to_text": (back, rows.relevant_texts),
    }


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_every_row_is_its_slow_definition(report, direction):
    reference = wanted_values(TEACHER)[direction][0]
    cases = {
        "teacher": wanted_values(TEACHER),
        "student": wanted_values(STUDENT),
        "student_query_teacher_index": wanted_values(TEACHER, asking=STUDENT),
    }
    for pairing, case in cases.items():
        found, relevant = case[direction]
        for k in (1, 5, 10):
            where = {"direction": direction, "pairing": pairing, "k": k}
            success = slow.success(found, relevant, k)
            assert report.value(measure="success", **where) == pytest.approx(np.mean(success))
            assert report.value(measure="recall", **where) == pytest.approx(np.mean(slow.recall(found, relevant, k)))
            if pairing == "teacher":
                continue
            assert report.value(measure="overlap", **where) == pytest.approx(np.mean(slow.overlap(found, reference, k)))
            top1 = slow.teacher_top1(found, np.array(reference), k)
            assert report.value(measure="teacher_top1", **where) == pytest.approx(np.mean(top1))
            theirs = slow.success(reference, relevant, k)
            assert report.value(measure="retention", **where) == pytest.approx(np.mean(success) / np.mean(theirs))
        if pairing != "teacher":
            rbo = np.mean([slow.rbo_uneven(a, b, 0.9) for a, b in zip(found, reference, strict=True)])
            assert report.value(measure="rbo", direction=direction, pairing=pairing) == pytest.approx(rbo)


def test_the_cases_differ_so_that_a_mix_up_would_show(report):
    values = {
        report.value(measure="success", k=1, pairing=p) for p in ("teacher", "student", "student_query_teacher_index")
    }
    assert len(values) == 3


def test_retention_has_the_paired_interval(report):
    found, relevant = wanted_values(STUDENT)["text_to_image"]
    reference, _ = wanted_values(TEACHER)["text_to_image"]
    student, teacher = slow.success(found, relevant, 1), slow.success(reference, relevant, 1)
    draws = np.random.Generator(np.random.Philox(3)).integers(0, len(student), size=(2000, len(student)))
    wanted = slow.slow_bootstrap_ratio(student, teacher, draws)
    row = next(
        row
        for row in report.rows
        if (row.measure, row.k, row.pairing, row.search, row.direction)
        == ("retention", 1, "student", "exact", "text_to_image")
    )
    assert (row.low, row.high) == pytest.approx(wanted, abs=1e-8)
    assert row.low < row.value < row.high


def test_the_index_is_measured_beside_the_exact_search(report):
    searches = {row.search for row in report.rows}
    assert searches == {"exact", "index:IVF4,Flat"}
    # four cells, all of them probed by default: the index finds what exact search does
    for pairing in ("teacher", "student", "student_query_teacher_index"):
        through = report.value(measure="success", k=5, pairing=pairing, search="index")
        assert through == report.value(measure="success", k=5, pairing=pairing)
    assert report.value(measure="overlap", k=10, pairing="teacher", search="index:IVF4,Flat") == 1
    assert report.value(measure="retention", k=10, pairing="teacher", search="index") == 1


def test_an_index_that_loses_hits_is_seen_to():
    pairs = toy_pairs(120)
    lossy = evaluate(STUDENT, pairs, teacher=TEACHER, index="PQ2x4")
    for measure in ("overlap", "retention"):
        through = lossy.value(measure=measure, k=5, search="index")
        assert through < lossy.value(measure=measure, k=5)
    assert lossy.value(measure="overlap", k=5, pairing="teacher", search="index") < 1


def test_auto_is_named_by_what_it_chose():
    report = evaluate(STUDENT, toy_pairs(5), index="auto")
    assert {row.search for row in report.rows} == {"exact", "index:Flat"}


def test_per_query_rows_hold_the_hits(report):
    rows = judged("test", toy_pairs())
    assert len(report.per_query) == (len(rows.texts) + len(rows.keys)) * 3 * 2
    found, relevant = wanted_values(STUDENT)["text_to_image"]
    mine = report.queries(direction="text_to_image", pairing="student", search="exact")
    assert [row.query for row in mine] == list(rows.texts)
    for i, row in enumerate(mine):
        assert row.keys == tuple(rows.keys[j] for j in found[i])
        assert list(row.scores) == sorted(row.scores, reverse=True)
        assert row.hit_ranks == tuple(place for place, j in enumerate(found[i], 1) if j in relevant[i])
        assert row.success == {str(k): int(any(place <= k for place in row.hit_ranks)) for k in (1, 5, 10)}
    overlap = np.mean([row.overlap for row in mine])
    assert overlap == pytest.approx(report.value(measure="overlap", k=10))
    reference = report.queries(direction="image_to_text", pairing="teacher", search="exact")
    assert [row.query for row in reference] == list(rows.keys)
    assert {row.overlap for row in reference} == {1.0}
    assert set(reference[0].keys) <= set(rows.texts)


def test_the_protocol_is_declared(report):
    (protocol,) = report.protocol
    assert protocol["directions"]["text_to_image"] == {"queries": 90, "gallery": 60, "ground_truth": True}
    assert protocol["directions"]["image_to_text"] == {"queries": 60, "gallery": 90, "ground_truth": True}
    assert protocol["captions_an_image"] == 2
    assert protocol["student"] == STUDENT.fingerprint
    assert protocol["teacher"] == TEACHER.fingerprint
    assert protocol["left_out"] == []
    row = report.rows[0]
    assert (row.queries, row.gallery) == (90, 60)


def test_a_small_gallery_is_padded_and_no_more():
    report = evaluate(STUDENT, toy_pairs(2, styles=1, captions=1), teacher=TEACHER)
    assert report.value(measure="success", k=10) == 1
    assert report.value(measure="recall", k=10) == 1
    assert report.value(measure="overlap", k=10) == 1
    assert report.value(measure="rbo", k=10) == pytest.approx(1, abs=1e-9)
    assert [len(row.keys) for row in report.per_query] == [2] * len(report.per_query)


def test_without_a_teacher_there_is_no_agreement():
    report = evaluate(STUDENT, toy_pairs())
    assert {row.measure for row in report.rows} == {"success", "recall"}
    assert {row.pairing for row in report.rows} == {"student"}
    assert {row.overlap for row in report.per_query} == {None}
    with pytest.raises(KeyError, match="measure: recall, success"):
        report.value(measure="overlap", k=10)


def test_pictures_without_captions_are_searched_among_and_do_not_ask():
    pairs = [*toy_pairs(4, 1, 1), pair("c0/extra", []), Pair("loose", None, ("c1/unpaired text",))]
    report = evaluate(STUDENT, pairs, teacher=TEACHER)
    (protocol,) = report.protocol
    assert protocol["directions"]["text_to_image"] == {"queries": 4, "gallery": 5, "ground_truth": True}
    assert protocol["directions"]["image_to_text"] == {"queries": 4, "gallery": 5, "ground_truth": True}
    assert "c0/extra" not in {row.query for row in report.per_query}


def test_pictures_alone_are_compared_with_the_teachers_ranking_without_themselves():
    pairs = [pair(f"c{c}/{s}", []) for c in range(6) for s in range(3)]
    pairs.append(pair("copy", [], data="c0/0"))  # the same picture again: a right answer, not the query itself
    report = evaluate(STUDENT, pairs, teacher=TEACHER, index="Flat", ks=(1, 5))
    assert {row.direction for row in report.rows} == {"image_to_image"}
    assert {row.measure for row in report.rows} == {"overlap", "teacher_top1", "rbo"}
    rows = judged("test", pairs)
    rankings = []
    for encoder in (STUDENT, TEACHER):
        vectors = encoder.encode_images(rows.pictures)
        found = slow.slow_top_k(vectors, vectors, len(vectors))
        rankings.append([[j for j, _ in row if j != i][:5] for i, row in enumerate(found)])
    for k in (1, 5):
        wanted = np.mean(slow.overlap(*rankings, k))
        for search in ("exact", "index"):
            got = report.value(measure="overlap", k=k, direction="image_to_image", search=search)
            assert got == pytest.approx(wanted)
    assert all(row.query not in row.keys for row in report.per_query)
    twin = next(row for row in report.queries(pairing="teacher", search="exact") if row.query == "copy")
    assert twin.keys[0] == "c0/0"
    assert twin.hit_ranks is None
    assert twin.success is None
    assert report.protocol[0]["directions"]["image_to_image"]["ground_truth"] is False


def test_unpaired_pictures_and_texts_are_compared_with_the_teacher_alone():
    pairs = [pair("c0/0", []), pair("c1/0", []), Pair("t", None, ("c0", "c1", "c2"))]
    report = evaluate(STUDENT, pairs, teacher=TEACHER, ks=(1,))
    assert {row.measure for row in report.rows} == {"overlap", "teacher_top1", "rbo"}
    assert {row.direction for row in report.rows} == {"text_to_image", "image_to_text"}


@pytest.mark.parametrize("pairs", [[pair("a", []), pair("b", [])], [pair("a", []), Pair("t", None, ("x",))]])
def test_nothing_to_compare_with_is_said_before_anything_is_encoded(pairs):
    encoder = ToyEncoder()
    with pytest.raises(DataError, match="no ground truth"):
        evaluate(encoder, pairs, name="mine")
    with pytest.raises(DataError, match="mine: there are no pictures"):
        evaluate(encoder, [Pair("t", None, ("x",))], name="mine", teacher=TEACHER)
    assert encoder.calls == []


def test_each_picture_and_each_unique_text_is_encoded_once():
    encoder = ToyEncoder()
    evaluate(encoder, toy_pairs(), index="Flat")
    assert encoder.calls == [("images", 60), ("texts", 90)]


def test_a_teacher_whose_success_is_nothing_gives_no_retention():
    rows = judged("test", [pair("a", ["x"]), pair("b", ["y"])])
    right = np.eye(2, dtype=np.float32)
    teacher = Embedded(right, right[::-1].copy(), "t")
    report = evaluate_embedded(rows, Embedded(right, right, "s"), teacher=teacher, ks=(1,))
    assert report.value(measure="success", k=1) == 1
    assert math.isnan(report.value(measure="retention", k=1))
    plain = report.to_json()
    row = next(row for row in plain["rows"] if row["measure"] == "retention")
    assert (row["value"], row["low"], row["high"]) == (None, None, None)
    json.dumps(plain, allow_nan=False)
    assert "n/a" in rendered(report)


def test_the_query_side_pairing_is_projected_or_left_out():
    pairs, narrow = toy_pairs(), ToyEncoder(0.7, seed=0, dim=8)
    without = evaluate(narrow, pairs, teacher=TEACHER)
    assert {row.pairing for row in without.rows} == {"teacher", "student"}
    assert "8 wide, the teacher's 16" in without.protocol[0]["left_out"][0]
    matrix = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    projected = evaluate(narrow, pairs, teacher=TEACHER, to_teacher=lambda rows: 5 * rows @ matrix)
    rows = judged("test", pairs)
    texts = narrow.encode_texts(rows.texts) @ matrix
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    found = [[j for j, _ in row] for row in slow.slow_top_k(texts, TEACHER.encode_images(rows.pictures), 10)]
    got = projected.value(measure="success", k=10, pairing="student_query_teacher_index")
    assert got == pytest.approx(np.mean(slow.success(found, rows.relevant_pictures, 10)))


def test_a_teacher_of_stored_float16_rows_is_the_teacher():
    rows = judged("test", toy_pairs())
    images, texts = TEACHER.encode_images(rows.pictures), TEACHER.encode_texts(rows.texts)
    stored = Embedded(images.astype(np.float16), texts.astype(np.float16), TEACHER.fingerprint)
    halves = evaluate(STUDENT, toy_pairs(), teacher=stored)
    assert halves.value(measure="overlap", k=10) == pytest.approx(
        evaluate(STUDENT, toy_pairs(), teacher=TEACHER).value(measure="overlap", k=10), abs=0.02
    )


def test_embeddings_that_do_not_fit_are_refused():
    rows = judged("test", toy_pairs(2, 1, 1))
    good = Embedded(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), "e")
    with pytest.raises(DataError, match="2 texts and 1 embeddings"):
        evaluate_embedded(rows, Embedded(good.images, good.texts[:1], "e"))
    with pytest.raises(DataError, match="test: embeddings of the pictures: row 0 has length 2"):
        evaluate_embedded(rows, good, teacher=Embedded(good.images * 2, good.texts, "t"))
    wide = Embedded(np.eye(2, 3, dtype=np.float32), np.eye(2, 3, dtype=np.float32), "t")
    with pytest.raises(DataError, match="same width"):
        evaluate_embedded(rows, good, teacher=wide, student_in_teacher=good)
    with pytest.raises(ConfigError, match=r"evaluate\.ks"):
        evaluate_embedded(rows, good, ks=(0, 5))
    with pytest.raises(ConfigError, match=r"index\.factory"):
        evaluate_embedded(rows, good, factory="Nope")


def test_the_report_is_the_same_every_time_and_survives_json(report):
    again = evaluate(STUDENT, toy_pairs(), teacher=TEACHER, index="IVF4,Flat", seed=3)
    assert again == report
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["schema"] == "clipdistill.report/1"
    assert RetrievalReport.from_json(plain) == report
    assert RetrievalReport.from_json(plain).to_json() == plain
    with pytest.raises(MismatchError, match=r"schema does not match: expected clipdistill\.report/1, found other/1"):
        RetrievalReport.from_json({**plain, "schema": "other/1"})


def test_a_report_written_by_the_first_version_still_reads():
    row = {
        "set": "test", "direction": "text_to_image", "pairing": "student", "search": "exact", "measure": "success",
        "k": 10, "value": 0.5, "low": 0.4, "high": 0.6, "queries": 2, "gallery": 3,
    }  # fmt: skip
    query = {
        "set": "test", "direction": "text_to_image", "pairing": "student", "search": "exact", "query": "a dog",
        "keys": ["a", "b"], "scores": [0.9, 0.1], "hit_ranks": [1], "overlap": None, "success": {"10": 1},
    }  # fmt: skip
    stored = {"schema": "clipdistill.report/1", "rows": [row], "per_query": [query], "protocol": [{"set": "test"}]}
    report = RetrievalReport.from_json(stored)
    assert report.value(measure="success") == 0.5
    assert report.per_query[0].keys == ("a", "b")
    assert report.to_json() == stored


def test_sets_are_merged_and_asked_for_by_name(report):
    unseen = evaluate(STUDENT, toy_pairs(10), name="unseen", teacher=TEACHER)
    both = RetrievalReport.merge([report, unseen])
    assert both.value(measure="success", k=10, set="unseen") == unseen.value(measure="success", k=10)
    assert both.value(measure="success", k=10, set="test") == report.value(measure="success", k=10)
    assert [part["set"] for part in both.protocol] == ["test", "unseen"]
    assert len(both.queries(set="unseen")) == len(unseen.per_query)
    with pytest.raises(KeyError, match=r"2 rows match.*set: test, unseen"):
        both.value(measure="success", k=10)
    with pytest.raises(ValueError, match="'test' is in two"):
        RetrievalReport.merge([report, report])


def test_a_missing_value_lists_what_there_is(report):
    with pytest.raises(KeyError, match=r"no rows match.*k: 1, 5, 10"):
        report.value(measure="success", k=7)


def rendered(report):
    from rich.console import Console

    console = Console(width=250, record=True, file=io.StringIO())
    console.print(report.table())
    return console.export_text()


def test_the_table_shows_a_line_for_each_ranking(report):
    text = rendered(report)
    assert text.count("student_query_teacher_index") == 4
    assert "90 x 60" in text
    assert "60 x 90" in text
    for column in ("success@1", "success@5", "success@10", "recall@10", "overlap@10", "retention@10"):
        assert column in text
    row = next(r for r in report.rows if (r.measure, r.k, r.pairing, r.search) == ("retention", 10, "student", "exact"))
    assert f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" in text


def test_embeddings_cut_to_a_width_are_pairings_of_their_own():
    rng = np.random.default_rng(0)
    pairs = [Pair(f"k{n}", Picture(f"m{n}", data=b"x"), (f"text {n}",)) for n in range(30)]
    rows = judged("test", pairs)

    def unit(count, dim):
        found = rng.standard_normal((count, dim)).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    teacher = Embedded(unit(30, 16), unit(30, 16), "t")
    whole = Embedded(teacher.images, teacher.texts, "s")
    short = Embedded(
        *(part[:, :4] / np.linalg.norm(part[:, :4], axis=1, keepdims=True) for part in (whole.images, whole.texts)), "s"
    )
    report = evaluate_embedded(rows, whole, teacher=teacher, narrower={4: (short, whole)}, ks=(1, 5))
    alone = evaluate_embedded(rows, short, teacher=teacher, student_in_teacher=whole, ks=(1, 5))
    for pairing in ("student", "student_query_teacher_index"):
        for measure in ("success", "overlap", "retention"):
            found = report.value(measure=measure, k=5, pairing=f"{pairing}@4")
            assert found == alone.value(measure=measure, k=5, pairing=pairing)
    assert report.value(measure="overlap", k=5, pairing="student@4") < 1
    assert report.value(measure="overlap", k=5, pairing="student_query_teacher_index@4") == 1


def test_texts_alone_are_measured_against_the_teachers_pictures_in_both_directions():
    """Each pairing beside slow rankings: student texts x teacher pictures, and teacher pictures x student texts."""
    rows = judged("test", toy_pairs())
    pictures, theirs = TEACHER.encode_images(rows.pictures), TEACHER.encode_texts(rows.texts)
    mine = STUDENT.encode_texts(rows.texts)
    teacher = Embedded(pictures, theirs, TEACHER.fingerprint)
    found = evaluate_query_side(rows, mine, STUDENT.fingerprint, teacher=teacher, factory="Flat", ks=(5,), seed=3)
    cases = (
        ("text_to_image", "student_query_teacher_index", (mine, pictures), (theirs, pictures), rows.relevant_pictures),
        ("image_to_text", "teacher_query_student_index", (pictures, mine), (pictures, theirs), rows.relevant_texts),
    )
    for direction, pairing, own, reference, relevant in cases:
        asked, wanted = ([[row for row, _ in hits] for hits in slow.slow_top_k(*pair, 5)] for pair in (own, reference))
        right = [any(row in answers for row in hits) for hits, answers in zip(asked, relevant, strict=True)]
        best = [any(row in answers for row in hits) for hits, answers in zip(wanted, relevant, strict=True)]
        common = [len(set(one) & set(other)) / 5 for one, other in zip(asked, wanted, strict=True)]
        for search in ("exact", "index"):
            where = {"k": 5, "direction": direction, "pairing": pairing, "search": search}
            assert found.value(measure="success", **where) == pytest.approx(np.mean(right))
            assert found.value(measure="overlap", **where) == pytest.approx(np.mean(common))
            assert found.value(measure="retention", **where) == pytest.approx(np.mean(right) / np.mean(best))
    assert {row.pairing for row in found.rows} == {
        "teacher",
        "student_query_teacher_index",
        "teacher_query_student_index",
    }
    assert found.protocol[0]["student"] == STUDENT.fingerprint
    assert "no picture tower" in found.protocol[0]["left_out"][0]


def test_a_set_without_texts_cannot_be_asked_by_texts_alone():
    rows = judged("bare", [Pair(p.key, p.picture, ()) for p in toy_pairs(4)])
    teacher = Embedded(TEACHER.encode_images(rows.pictures), np.empty((0, TEACHER.dim), np.float32), "t")
    with pytest.raises(DataError, match="bare: there are no texts"):
        evaluate_query_side(rows, teacher.texts, "s", teacher=teacher)
    rows = judged("test", toy_pairs(4))
    teacher = Embedded(TEACHER.encode_images(rows.pictures), TEACHER.encode_texts(rows.texts), "t")
    with pytest.raises(DataError, match="embeddings"):
        evaluate_query_side(rows, teacher.texts[:-1], "s", teacher=teacher)
