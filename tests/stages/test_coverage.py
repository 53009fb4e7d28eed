import numpy as np
import pytest
import tiny
from stages.test_inputs import changed, workspace  # noqa: F401 - a fixture

from clipdistill.evaluation.coverage import cover
from clipdistill.report.lines import inspection_lines
from clipdistill.stages import coverage as stage
from clipdistill.stages.coverage import coverage
from clipdistill.stages.inputs import load_data, open_cache
from clipdistill.stages.inspect import inspect
from clipdistill.stages.teachers import open_teachers


@pytest.fixture
def live(workspace):  # noqa: F811
    return workspace, load_data(workspace), open_teachers(workspace.config)


def test_the_cache_and_the_live_teacher_give_the_same_coverage_of_small_data(live):
    workspace, data, teachers = live  # noqa: F811
    sampled = coverage(workspace, data, teachers, 0.0, 0.0)
    assert (sampled["from"], sampled["note"]) == ("sample", "there is no teacher cache yet")
    cache, data = open_cache(workspace, data, teachers)
    stored = coverage(workspace, data, teachers, 0.0, 0.0)
    assert (stored["from"], stored["note"]) == ("cache", None)
    assert list(stored["sets"]) == list(sampled["sets"]) == ["val", "test"]
    for name, sides in stored["sets"].items():
        for kind, row in sides.items():
            assert row["queries"] == {"val": 8, "test": 10}[name]
            assert row["median"] == pytest.approx(sampled["sets"][name][kind]["median"], abs=1e-3)
    keys = {name: [pair.key for pair in data.sets[name].pairs] for name in ("train", "val")}
    wanted = cover(cache.image_rows(keys["val"]), cache.image_rows(keys["train"]))
    assert stored["sets"]["val"]["pictures"]["median"] == wanted.median
    assert stored["sets"]["val"]["pictures"]["faults"] == list(wanted.faults)


def test_a_slow_teacher_is_left_alone_and_the_lines_say_so(live):
    workspace, data, teachers = live  # noqa: F811
    found = coverage(workspace, data, teachers, 2.0, 1000.0)
    assert found["from"] is None
    assert "would take the teacher 257 s" in found["note"]


def test_a_cache_of_other_data_is_not_measured_with(live, tmp_path):
    workspace, data, teachers = live  # noqa: F811
    open_cache(workspace, data, teachers)
    tiny.image_folder(tmp_path / "more", 3, 50)
    more = changed(workspace, data={"train": (*workspace.config.data.train, workspace.config.data.val[0])})
    more = changed(more, data={"val": (more.config.data.train[0].model_copy(update={"path": str(tmp_path / "more")}),)})
    found = coverage(more, load_data(more), teachers, 0.0, 0.0)
    assert found["from"] == "sample"
    assert "data.pictures does not match" in found["note"]


def test_an_unreadable_picture_is_left_out_of_a_sample(live, tmp_path):
    workspace, _, teachers = live  # noqa: F811
    path = tmp_path / "train" / "p003.png"
    path.write_bytes(path.read_bytes()[:200])
    found = coverage(workspace, load_data(workspace), teachers, 0.0, 0.0)
    assert found["sets"]["val"]["pictures"]["rows"] == 23


def test_a_sample_is_bounded(live, monkeypatch):
    monkeypatch.setattr(stage, "SAMPLE_ROWS", 12)
    monkeypatch.setattr(stage, "SAMPLE_QUERIES", 5)
    found = coverage(*live, 0.0, 0.0)
    row = found["sets"]["test"]["texts"]
    assert (row["rows"], row["queries"]) == (12, 5)


def test_inspection_reports_coverage_and_the_unused_rows(live):
    workspace, _, _ = live  # noqa: F811
    less = changed(workspace, data={"fraction": 0.5})
    data = load_data(less)
    found = inspect(less, data)
    assert found["unused"] == 24 - len(data.sets["train"])
    lines = "\n".join(inspection_lines(found, less.rejected))
    assert f"data.fraction leaves {found['unused']} more rows of train unused" in lines
    assert "from a sample (there is no teacher cache yet)" in lines
    rows = [row for sides in found["coverage"]["sets"].values() for row in sides.values()]
    assert lines.count("WARNING: train does not cover") == sum(bool(row["faults"]) for row in rows)
    assert np.isfinite([row["median"] for row in rows]).all()
