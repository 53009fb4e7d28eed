"""The benchmark that compares presets: what it plans, what it keeps, what it says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from clipdistill.core.errors import ConfigError
from clipdistill.losses.presets import PRESETS
from clipdistill.losses.weights import TERM_WEIGHTS
from clipdistill.stages.train import loss_weights

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    import presets

    yield presets
    for name in {"presets", "bars", "result"} & (set(sys.modules) - before):
        del sys.modules[name]


def report(value=0.25):
    rows = [
        {"direction": direction, "search": search, "k": k, "measure": measure, "set": name, "pairing": pairing}
        | {"value": value if (direction, search, k) == ("text_to_image", "exact", 10) else 9.0}
        for direction in ("text_to_image", "image_to_text")
        for search in ("exact", "index:Flat")
        for k in (1, 10)
        for measure in ("overlap", "success", "retention")
        for name in ("test", "unseen")
        for pairing in ("student", "student_query_teacher_index")
    ]
    return {"evaluation": {"rows": rows}}


def test_every_preset_is_measured_on_three_seeds_unless_told_otherwise(bench):
    options, losses = bench.parse([])
    assert list(losses) == list(PRESETS)
    assert (options.seeds, options.steps, options.jobs) == ([17, 18, 19], 120, 1)
    for name, loss in losses.items():
        assert loss_weights(loss) == PRESETS[name]


def test_a_candidate_has_the_weights_that_it_names_and_no_others(bench):
    given = ["--presets", "fd", "--candidate", "soft", "feature_cosine=8, affinity=0.5, affinity_rows=pairs"]
    _, losses = bench.parse([*given, "--candidate", "more", "preset=clip_kd,clip=0"])
    soft, more = (loss_weights(losses[name]) for name in ("soft", "more"))
    assert soft.weighted == ("affinity", "feature_cosine")
    assert (soft.feature_cosine, soft.affinity, soft.affinity_rows) == (8.0, 0.5, "pairs")
    assert set(PRESETS["clip_kd"].weighted) - set(more.weighted) == {"clip"}
    assert set(soft.weighted) <= set(TERM_WEIGHTS)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--presets", "clip_rt"], "did you mean 'clip_rd'"),
        (["--candidate", "fd", "clip=1"], "'fd' is a preset's name"),
        (["--candidate", "x", "clop=1"], "loss.clop: unknown key; did you mean 'clip'"),
        (["--candidate", "x", "clip=-1"], "loss.clip: "),
    ],
)
def test_what_is_no_loss_is_refused(bench, arguments, fault):
    with pytest.raises(ConfigError, match=fault):
        bench.parse(arguments)


def test_the_interval_over_seeds_is_students(bench):
    mean, low, high = bench.interval([0.2, 0.4, 0.6])
    assert mean == pytest.approx(0.4)
    assert high - mean == pytest.approx(4.303 * 0.2 / math.sqrt(3))
    assert mean - low == pytest.approx(high - mean)
    assert bench.interval([0.3]) == (0.3, 0.3, 0.3)


def test_the_report_is_read_for_text_to_image_by_exact_search_at_ten(bench):
    found = dict(bench.figures_of(report(0.25)))
    assert tuple(found) == bench.FIGURES
    assert set(found.values()) == {0.25}
    assert "overlap10_unseen_query_side" in found


def test_a_finished_run_is_kept_and_a_failed_one_told(bench, monkeypatch, tmp_path):
    calls = []

    def run(call, **given):
        calls.append((call, given["env"]["OMP_NUM_THREADS"]))
        out = Path(call[call.index("--out") + 1])
        (out / "training").mkdir(parents=True)
        (out / "report.json").write_text(json.dumps(report(0.5)))
        return subprocess.CompletedProcess(call, 0, "", "")

    monkeypatch.setattr(bench.subprocess, "run", run)

    class Config:
        def to_toml(self):
            return "seed = 17\n"

    one = bench.Run("fd", 17, Config(), tmp_path / "fd-17")
    first = bench.measure(one)
    assert bench.measure(one) == first
    assert [threads for _, threads in calls] == ["1"]
    assert first["overlap10_test"] == 0.5
    assert not (one.folder / "training").exists()
    failing = subprocess.CompletedProcess([], 2, "", "no such preset")
    monkeypatch.setattr(bench.subprocess, "run", lambda *a, **k: failing)
    with pytest.raises(RuntimeError, match="fd, seed 18: exit code 2: no such preset"):
        bench.measure(bench.Run("fd", 18, Config(), tmp_path / "fd-18"))


def test_default_is_held_against_the_lower_end_of_the_best(bench):
    values = {"default": 0.5, "fd": 0.6, "clip": 0.1}
    steps = (-0.02, 0.0, 0.02)
    found = {name: [dict.fromkeys(bench.FIGURES, value + x) for x in steps] for name, value in values.items()}
    figures = bench.summarise(found)
    low = figures["fd_overlap10_test_low"]
    assert low == pytest.approx(0.6 - 4.303 * 0.02 / math.sqrt(3), abs=1e-4)
    barred = bench.bars_of(figures, list(values))
    assert barred == {f"default_{figure}": {"at_least": low} for figure in bench.BARRED}
    lines = bench.bars.compared(figures, barred, list(values), bench.FIGURES[:2]).splitlines()
    assert lines[0] == "| | `overlap10_test` | `success10_test` |"
    assert lines[2].startswith("| `default` | 0.500 [0.450, 0.550] (**missed** 0.550) |")
    assert "missed" not in lines[3]


def test_a_run_of_another_loss_or_setting_has_another_folder(bench, monkeypatch, tmp_path):
    import tiny

    from clipdistill.config import RunConfig

    path = tiny.run_toml(tmp_path)
    monkeypatch.setattr(bench, "demo_config", lambda overrides, out: RunConfig.load(path, overrides))

    def folders(*arguments):
        options, losses = bench.parse(["--presets", "fd,clip", "--seeds", "1,2", *arguments])
        return [run.folder.name for run in bench.plan(options, losses)]

    plain = folders()
    assert [name.rsplit("-", 1)[0] for name in plain] == ["fd-1", "clip-1", "fd-2", "clip-2"]
    assert plain == folders()
    assert not set(plain) & set(folders("--steps", "7"))
    assert not set(plain) & set(folders("--set", "train.lr=0.5"))
    monkeypatch.setitem(loss_weights.__globals__, "PRESETS", {**PRESETS, "fd": PRESETS["clip_kd"]})
    changed = folders()
    assert [one == other for one, other in zip(plain, changed, strict=True)] == [False, True, False, True]


@pytest.fixture
def inheritance(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    import inheritance

    yield inheritance
    for name in {"inheritance", "result"} & (set(sys.modules) - before):
        del sys.modules[name]


def test_inheritance_is_judged_by_the_steps_to_the_drawn_students_best(inheritance):
    drawn = [(10, 0.1), (20, 0.3), (30, 0.3), (40, 0.2)]
    found = inheritance.compared([(10, 0.29), (20, 0.3), (30, 0.5), (40, 0.4)], drawn)
    assert (found["steps_inherited"], found["steps_random"], found["steps_ratio"]) == (20, 20, 1.0)
    assert inheritance.compared([(10, 0.4), (20, 0.5)], drawn)["steps_ratio"] == 0.5
    never = inheritance.compared([(10, 0.1), (20, 0.2), (30, 0.2), (40, 0.2)], drawn)
    assert (never["steps_inherited"], never["steps_ratio"]) == (41, 2.05)


def test_both_students_of_a_seed_differ_in_where_they_begin_alone(inheritance, tmp_path):
    inheritance.register(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(inheritance.TEACHER_CFG), encoding="utf-8")
    inheritance.register(tmp_path)
    (tmp_path / "teacher" / "student").mkdir(parents=True)
    one, two = (inheritance.student_config(tmp_path, kind, 17, 40, 10) for kind in inheritance.KINDS)
    assert one.train == two.train
    assert (one.data, one.loss, one.seed, one.cache) == (two.data, two.loss, two.seed, two.cache)
    assert (one.student.inherit.width, one.student.inherit.depth) == (0.5, 1.0)
    assert (two.student.image_init, two.student.text_init, one.student.vocab_size) == ("random", "random", 8600)


def test_a_folder_of_other_settings_is_not_taken_for_these(inheritance, tmp_path):
    inheritance.register(tmp_path)
    (tmp_path / "teacher" / "student").mkdir(parents=True)
    asked = inheritance.student_config(tmp_path, "inherited", 17, 40, 10)
    folder = tmp_path / "inherited_17"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asked.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    (folder / "curve.json").write_text('{"curve": [[10, 0.5]], "seconds": 1.0}', encoding="utf-8")
    assert inheritance.done(tmp_path, "inherited_17", asked)["curve"] == [[10, 0.5]]
    longer = inheritance.student_config(tmp_path, "inherited", 17, 50, 10)
    with pytest.raises(RuntimeError, match="other settings"):
        inheritance.done(tmp_path, "inherited_17", longer)
