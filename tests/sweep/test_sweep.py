"""A sweep on a small real run: finished, killed, shared by two workers, and with trials that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
from typer.testing import CliRunner

from clipdistill.cli import app
from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError
from clipdistill.sweep import run_sweep

pytestmark = pytest.mark.slow
AXES = 'sweep.axes.student=[{text="nano"}, {text="tiny"}, {text="nano", dim=16}]'
CALL = ("sweep", "run.toml", AXES, "sweep.sampler=grid", "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    tiny.run_toml(folder)
    for number in range(42, 66):  # more than ten to rank: else every student agrees with every teacher
        (folder / f"val/p{number:03d}.png").write_bytes(tiny.image_bytes(number))
        (folder / f"val/p{number:03d}.txt").write_text(tiny.caption(number), encoding="utf-8")
    return folder


def start(folder, out):
    return subprocess.Popen(
        [sys.executable, "-m", "clipdistill", *CALL, "--out", str(out)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def ended(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def swept(folder, out, *overrides):
    config = RunConfig.load(folder / "run.toml", overrides)
    return run_sweep(config, out, folder)


def compared(results):
    """What must not depend on kills, workers and time."""
    return [
        {
            "number": trial["number"],
            "state": trial["state"],
            "params": trial["params"],
            "curves": [seed["curve"] for seed in trial["seeds"]],
            "sets": [seed["sets"] for seed in trial["seeds"]],
            "objective": trial["objective"],
        }
        for trial in results["trials"]
    ]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The grid, done by one worker that nobody disturbs: a process like the others, for bits depend on the threads."""
    out = tmp_path_factory.mktemp("whole")
    return out, ended(start(folder, out))


def test_every_trial_is_a_run_with_reports_and_students_and_without_checkpoints(whole):
    out, results = whole
    assert results == json.loads((out / "sweep.json").read_text())
    assert [trial["state"] for trial in results["trials"]] == ["complete"] * 3
    assert (out / "cache/manifest.json").exists()
    for trial in results["trials"]:
        (seed,) = trial["seeds"]
        run = out / "trials" / f"{trial['number']:04d}" / f"seed-{seed['seed']}"
        report = json.loads((run / "report.json").read_text())
        assert seed["parameters"] == report["sizes"]["student"]["parameters"]
        assert seed["picture_ms"] == pytest.approx(1000 / report["speeds"]["student"]["images_per_s"])
        assert seed["rows"] == 24
        assert set(seed["sets"]["test"]) == {"overlap10", "success10", "retention10"}
        assert [step for step, _ in seed["curve"]] == [2, 4]
        assert trial["objective"] == max(score for _, score in seed["curve"])
        assert seed["seconds"] > 0
        assert (run / "student/open_clip_config.json").exists()
        assert not (run / "training/checkpoints").exists()
        assert not (run / "cache").exists()
    nano, tiny, _ = (trial["seeds"][0]["parameters"] for trial in results["trials"])
    assert tiny > nano


def test_kills_at_any_moment_lose_nothing(folder, whole, tmp_path):
    """Killed after each of several times, and started again until it ends: the same results, to the last bit."""
    done = []
    for delay in (5.0, 9.0):
        process = start(folder, tmp_path)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = sorted(path.parent.name for path in tmp_path.glob("trials/*/trial.json"))
        assert set(done) <= set(found)
        done = found
    assert compared(ended(start(folder, tmp_path))) == compared(whole[1])


def test_two_workers_share_the_trials(folder, whole, tmp_path):
    first, second = start(folder, tmp_path), start(folder, tmp_path)
    results = ended(first)
    assert compared(ended(second)) == compared(results) == compared(whole[1])


def test_a_refused_combination_fails_and_the_sweep_goes_on(folder, tmp_path):
    """Each value of the axes is fine with some of the others', but one pair leaves nothing to train on."""
    axes = 'sweep.axes={"train.batch"=[0, 8], "train.batch_texts"=[0, 4]}'
    results = swept(folder, tmp_path, axes, "sweep.sampler=grid", "train.steps=2")
    assert [trial["state"] for trial in results["trials"]] == ["failed", "complete", "complete", "complete"]
    refused = results["trials"][0]
    assert refused["params"] == {"train.batch": 0, "train.batch_texts": 0}
    assert "nothing to train on" in refused["reason"]
    assert refused["objective"] is None


def test_lagging_trials_are_stopped(folder, tmp_path):
    """Two good learning rates and a useless one, which is stopped at the first validation."""
    results = swept(
        folder,
        tmp_path,
        'sweep.axes={"train.lr"=[3e-3, 2e-3, 1e-9]}',
        "sweep.sampler=grid",
        "sweep.startup=2",
        "train.steps=12",
        "train.eval_every=8",
    )
    states = [trial["state"] for trial in results["trials"]]
    assert states == ["complete", "complete", "pruned"]
    curves = [trial["seeds"][0]["curve"] for trial in results["trials"]]
    assert [[step for step, _ in curve] for curve in curves] == [[8, 12], [8, 12], [8]]
    assert results["trials"][2]["reason"] == "stopped after step 8 of 12: below the median of 2"
    assert results["trials"][2]["objective"] == curves[2][0][1]
    assert (tmp_path / "trials/0002/seed-3/training/metrics.jsonl").exists()
    assert not (tmp_path / "trials/0002/seed-3/training/checkpoints").exists()


def test_a_trial_with_the_values_of_an_earlier_one_takes_its_results_over(folder, tmp_path):
    results = swept(folder, tmp_path, 'sweep.axes={"loss.temperature"=[1.0, 2.0]}', "sweep.trials=5", "train.steps=2")
    first = {}
    for trial in results["trials"]:
        earlier = first.setdefault(trial["params"]["loss.temperature"], trial)
        assert trial["objective"] == earlier["objective"]
        assert trial["repeats"] == (None if trial is earlier else earlier["number"])
    assert len(first) <= 2
    assert len(list(tmp_path.glob("trials/*/seed-3"))) == len(first)


def test_seeds_and_shared_caches(folder, tmp_path):
    """Two seeds a trial; another number of views needs another cache, which both its trials share."""
    results = swept(
        folder,
        tmp_path,
        "sweep.axes.cache=[{}, {views=2}, {views=2, probe_rows=4}]",
        "sweep.sampler=grid",
        "sweep.seeds=2",
        "train.steps=2",
    )
    assert [[seed["seed"] for seed in trial["seeds"]] for trial in results["trials"]] == [[3, 4]] * 3
    for trial in results["trials"]:
        assert trial["objective"] == pytest.approx(sum(seed["objective"] for seed in trial["seeds"]) / 2)
    assert len(list((tmp_path / "teachers").glob("*/cache/manifest.json"))) == 1
    assert (tmp_path / "cache/manifest.json").exists()


def test_a_sweep_of_failures_ends_with_1_and_the_reasons(folder, tmp_path):
    axis = 'sweep.axes={"train.lr"=[1e30, 1e31]}'
    call = ["sweep", str(folder / "run.toml"), axis, "sweep.sampler=grid", "train.max_skipped=0", "train.steps=2"]
    done = CliRunner().invoke(app, [*call, "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "2 failed" in done.stdout
    assert "steps were not finite" in done.stdout


def test_a_wrong_axis_is_told_before_anything_is_written(folder, tmp_path):
    call = ["sweep", str(folder / "run.toml"), 'sweep.axes={"loss.temprature"=[1]}', "--out", str(tmp_path / "none")]
    done = CliRunner().invoke(app, call)
    assert isinstance(done.exception, ConfigError)
    assert "did you mean 'loss.temperature'?" in str(done.exception)
    assert not (tmp_path / "none").exists()


def test_a_sweep_needs_a_validation_set(folder, tmp_path):
    raw = {"name": "a", "data": {"train": "train"}, "teacher": {"model": "local-dir:teacher"}}
    config = RunConfig.parse(raw | {"sweep": {"axes": {"train.lr": [1e-3]}}}, folder)
    with pytest.raises(ConfigError, match=r"data\.val: a sweep compares its trials on a validation set"):
        run_sweep(config, tmp_path / "none", folder)
