"""The recall budget as it is told: sentences, columns, and a mark for each precision."""

import pytest

from clipdistill.report.compression import budget_summary, compression_curve, compression_section, finding, losses

ONE = {"share": 0.7, "dim": 32, "rotation": "pca", "precision": "int8", "factory": "SQ8"}
ONE |= {"success": 0.4, "overlap": 0.3, "retention": 0.96, "bytes_per_vector": 32.5, "megabytes": 5.02}
KINDS = ("teacher", "student", "pruned", "truncated", "quantised", "index", "runtime")


def row(name, kind, lost):
    shares = {f"{key}{end}": 0.9 for key in ("retention", "kept") for end in ("", "_low", "_high")}
    speeds = (
        {"images_per_s": None, "texts_per_s": None} if kind == "index" else {"images_per_s": 41, "texts_per_s": 1234}
    )
    return {
        "set": name,
        "kind": kind,
        "step": f"step {kind}",
        "k": 10,
        "success": 0.4,
        "overlap": 0.3,
        "lost": lost,
        "bytes_per_vector": 32.5,
        "megabytes": 5.02,
        "queries": 7,
        "gallery": 70,
        **shares,
        **speeds,
    }


def budget(**changes):
    sets = ("val", "test", "unseen")
    points = [
        {**ONE, "set": name, "precision": precision, "bytes_per_vector": size, "retention": size / 100}
        for name in sets
        for precision in ("fp32", "int8")
        for size in (16.0, 64.0)
    ]
    most = {
        "val": {"step": "step index", "lost": 0.02},
        "test": {"step": "step student", "lost": 0.0451},
        "unseen": None,
    }
    return {
        "k": 10,
        "target": {"retention": 0.95, "of": "student", "megabytes": 8.0, "bytes_per_vector": None},
        "met": True,
        "chosen": ONE,
        "missed": None,
        "attempts": [{"met": True}],
        "candidates": [ONE] * 12,
        "left_out": ["128 pca, PQ64x4fs: too few vectors"],
        "rows": [row(name, kind, 0.01) for name in sets for kind in KINDS],
        "most_lost": most,
        "curve": points,
        **changes,
    }


def test_the_sentences_say_what_was_chosen_and_where_recall_was_lost():
    assert finding(budget()) == (
        "The smallest of 12 combinations that keeps the target (95.0% of the student's success@10, 8 megabytes) is "
        "70% of the channels, cut to 32 (pca), int8 graphs, SQ8: as it is exported, retention 0.960 on val, "
        "32.5 bytes a vector, 5.02 megabytes of towers."
    )
    assert losses(budget()) == (
        "On test most recall is lost at the step “step student”: 0.045 of success@10.",
        "On unseen no step loses any success@10.",
    )
    assert losses(budget(most_lost={"val": None})) == ("On val no step loses any success@10.",)


@pytest.mark.parametrize(("failed", "words"), [(1, "1 smaller one kept it"), (2, "2 smaller ones kept it")])
def test_smaller_ones_that_failed_once_exported_are_told(failed, words):
    told = finding(budget(attempts=[{"met": False}] * failed + [{"met": True}]))
    assert told.endswith(f"{words} in the search, and did not once exported.")


def test_a_missed_target_is_told_by_how_much():
    missed = {"says": "0.0200 short of the retention"}
    told = finding(budget(met=False, missed=missed, attempts=[{"met": False}]))
    assert told.startswith("None of 12 combinations keeps the target")
    assert told.endswith("it is 0.0200 short of the retention.")


def test_the_terminal_has_a_table_a_set_with_every_column():
    tables = [part for part in budget_summary(budget()) if hasattr(part, "columns")]
    assert len(tables) == 3
    headings = [column.header for column in tables[0].columns]
    assert headings == [
        "",
        "success@10",
        "lost",
        "kept",
        "retention",
        "overlap@10",
        "bytes",
        "MB",
        "pictures/s",
        "texts/s",
    ]
    assert [str(cell) for cell in tables[0].columns[0].cells] == [f"step {kind}" for kind in KINDS]
    assert [str(cell) for cell in tables[0].columns[-1].cells][-2:] == ["n/a", "1,234"]
    told = "\n".join(str(part) for part in budget_summary(budget()))
    assert "left out: 128 pca" in told
    assert "On test most recall is lost" in told


def test_the_curve_has_a_line_for_each_set_and_precision():
    drawn = compression_curve(budget())
    for name in ("val", "test", "unseen"):
        for precision in ("fp32", "int8"):
            assert f"{name}, {precision}: 0.160 at 16 bytes, 0.640 at 64 bytes" in drawn.text
    for word in ("val", "test", "unseen", "fp32", "int8"):
        assert drawn.svg.count(f">{word}<") == 1, "each once in the legend"
    assert compression_curve(budget(curve=[])) is None
    assert compression_section(budget()).curve == drawn
