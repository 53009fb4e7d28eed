from __future__ import annotations

import itertools
import subprocess
import sys
import time

import pytest
import tiny

from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError, DataError, MismatchError, MissingExtraError
from clipdistill.core.locks import FileLock
from clipdistill.sweep import study as module
from clipdistill.sweep.axes import Axis, label, read_axes
from clipdistill.sweep.outcome import (
    COMPLETE,
    FAILED,
    PRUNED,
    Outcome,
    SeedResult,
    read_outcome,
    read_outcomes,
    trial_folder,
    write_outcome,
)
from clipdistill.sweep.pruning import comparable, lags
from clipdistill.sweep.study import Study

GRID = {"loss.temperature": [0.5, 1.0, 2.0], "student": [{"text": "nano"}, {"text": "tiny"}]}
RANGES = {"train.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "train.warmup": {"low": 0, "high": 900}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    tiny.run_toml(folder)
    return folder


def opened(folder, out, axes, **sweep):
    raw = {
        "name": "a",
        "data": {"train": "train", "val": "val"},
        "teacher": {"model": "local-dir:teacher"},
        "sweep": {"axes": axes, "startup": 3, **sweep},
    }
    config = RunConfig.parse(raw, folder)
    return Study(config, read_axes(config.sweep), out, folder)


def score(params):
    """A function of the values alone, with its highest at lr = 1e-2."""
    if "train.lr" in params:
        return -abs(params["train.lr"] - 1e-2) - params["train.warmup"] / 1e5
    return params["loss.temperature"] + len(params["student"]["text"])


def finish(study, out, taken, state=COMPLETE):
    result = SeedResult(1, score(taken.params) if state != FAILED else None)
    reason = "" if state == COMPLETE else "because"
    outcome = Outcome(taken.number, state, taken.params, (result,), reason)
    write_outcome(out, outcome)
    study.finish(outcome)
    taken.lock.release()


def all_params(folder, out, axes, *, dies=(), **sweep):
    """The values of all trials in order; the worker dies and is replaced at some of them."""
    study, found = opened(folder, out, axes, **sweep), []
    while (taken := study.take()) is not None:
        if taken.number in dies:
            taken.lock.release()
            study = opened(folder, out, axes, **sweep)
            again = study.take()
            assert again is not None
            assert (again.number, again.params) == (taken.number, taken.params)
            taken = again
        found.append(taken.params)
        finish(study, out, taken)
    return found


def test_a_grid_is_the_full_product_in_order(folder, tmp_path):
    found = all_params(folder, tmp_path, GRID, sampler="grid")
    expected = itertools.product(GRID["loss.temperature"], GRID["student"])
    assert [tuple(params.values()) for params in found] == list(expected)


def test_a_grid_larger_than_the_trials_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"the grid has 6 points, but sweep.trials = 5: raise it to 6"):
        opened(folder, tmp_path, GRID, sampler="grid", trials=5)


def test_random_over_lists_draws_every_point_once(folder, tmp_path):
    found = all_params(folder, tmp_path / "a", GRID, sampler="random", trials=50)
    assert len(found) == 6
    assert len({label(params) for params in found}) == 6
    fewer = all_params(folder, tmp_path / "b", GRID, sampler="random", trials=3)
    assert fewer == found[:3]
    assert [tuple(params.values()) for params in found] != list(itertools.product(*GRID.values()))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
@pytest.mark.parametrize("storage", [None, "journal:{}/journal.log"])
def test_a_sweep_that_is_killed_goes_on_with_the_same_values(folder, tmp_path, sampler, storage):
    def run(name, **more):
        file = None if storage is None else storage.format(tmp_path / name)
        return all_params(folder, tmp_path / name, RANGES, sampler=sampler, trials=9, storage=file, **more)

    whole = run("whole")
    assert run("killed", dies=(0, 2, 5, 8)) == whole
    assert len({params["train.lr"] for params in whole}) == 9
    assert all(1e-4 <= params["train.lr"] <= 1e-1 for params in whole)
    assert all(isinstance(params["train.warmup"], int) for params in whole)


@pytest.mark.slow
def test_tpe_comes_nearer_to_the_best_than_random(folder, tmp_path):
    def nearest(sampler):
        found = all_params(folder, tmp_path / sampler, RANGES, sampler=sampler, trials=20)
        return sum(score(params) for params in found[-8:])

    assert nearest("tpe") > nearest("random")


def test_live_workers_never_take_the_same_trial_and_dead_ones_are_replaced(folder, tmp_path):
    first, second = (opened(folder, tmp_path, GRID, sampler="grid", trials=6) for _ in range(2))
    mine, other = first.take(), second.take()
    assert (mine.number, other.number) == (0, 1)
    other.lock.release()  # as if the second worker had died
    orphan = first.take()
    assert (orphan.number, orphan.params) == (1, other.params)
    assert second.take().number == 2
    assert first.progress() == module.Progress(finished=0, running=3, budget=6)


def test_the_budget_is_shared_and_counts_failures(folder, tmp_path):
    first, second = (opened(folder, tmp_path, RANGES, trials=3) for _ in range(2))
    for study, state in ((first, FAILED), (second, PRUNED), (first, COMPLETE)):
        finish(study, tmp_path, study.take(), state)
    assert first.take() is None
    assert second.take() is None
    assert second.progress() == module.Progress(finished=3, running=0, budget=3)
    assert opened(folder, tmp_path, RANGES, trials=4).take().number == 3


def test_reports_come_once(folder, tmp_path):
    study = opened(folder, tmp_path, RANGES)
    taken = study.take()
    study.report(taken.number, 10, 0.5)
    again = opened(folder, tmp_path, RANGES)
    again.report(taken.number, 10, 0.5)
    again.report(taken.number, 20, 0.25)
    assert again.curves() == {0: {10: 0.5, 20: 0.25}}


def test_another_configuration_is_refused_and_more_trials_are_not(folder, tmp_path):
    opened(folder, tmp_path, RANGES, trials=3)
    opened(folder, tmp_path, RANGES, trials=5)
    with pytest.raises(MismatchError, match="sweep does not match"):
        opened(folder, tmp_path, RANGES, trials=3, seeds=2)


def test_a_storage_without_its_folder_is_refused(folder, tmp_path):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    study = opened(folder, tmp_path / "one", RANGES, storage=storage)
    finish(study, tmp_path / "one", study.take())
    with pytest.raises(DataError, match="Give the --out that the sweep was begun with"):
        opened(folder, tmp_path / "two", RANGES, storage=storage).take()


def test_a_relative_storage_starts_at_the_configuration(folder, tmp_path):
    opened(folder, tmp_path, RANGES, storage="sqlite:///stores/here.db")
    assert (folder / "stores/here.db").exists()
    with pytest.raises(ConfigError, match="neither sqlite:///FILE nor journal:FILE"):
        opened(folder, tmp_path, RANGES, storage="postgresql://host/x")


def test_without_optuna_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'clipdistill\[sweep\]'"):
        opened(folder, tmp_path, RANGES)


def test_outcomes_read_back_equal(tmp_path):
    result = SeedResult(3, 0.5, 20, ((10, 0.25), (20, 0.5)), 1.5, 100, 8, 2.5, None, {"test": {"overlap10": 0.5}})
    outcome = Outcome(12, COMPLETE, {"student": {"dim": 8}}, (result, SeedResult(4, 0.25)))
    write_outcome(tmp_path, outcome)
    write_outcome(tmp_path, Outcome(2, FAILED, {"student": {"dim": 8}}, (SeedResult(3),), "why"))
    assert read_outcome(tmp_path, 12) == outcome
    assert read_outcome(tmp_path, 0) is None
    assert [one.number for one in read_outcomes(tmp_path)] == [2, 12]
    assert outcome.objective == 0.375
    assert read_outcome(tmp_path, 2).objective is None
    assert trial_folder(tmp_path, 12).name == "0012"


def test_a_lock_is_free_once_its_process_is_killed(tmp_path):
    path = tmp_path / "lock"
    script = (
        "import sys, time; from pathlib import Path; from clipdistill.core.locks import FileLock\n"
        "print(FileLock(Path(sys.argv[1])).acquire(wait=True), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "True\n"
        lock = FileLock(path)
        assert not lock.acquire(wait=False)
        holder.kill()
        started = time.monotonic()
        assert lock.acquire(wait=True)
        assert time.monotonic() - started < 10
        assert not FileLock(path).acquire(wait=False)
        lock.release()
        assert FileLock(path).acquire(wait=False)
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(
    ("scores", "others", "expected"),
    [
        ({10: 0.4}, [{10: 0.5}, {10: 0.3}, {10: 0.6}], True),
        ({10: 0.5}, [{10: 0.5}, {10: 0.3}, {10: 0.6}], False),  # at the median
        ({5: 0.55, 10: 0.4}, [{10: 0.5}, {10: 0.3}, {10: 0.6}], False),  # its best so far counts
        ({10: 0.4, 20: 0.9}, [{10: 0.5}, {10: 0.5}], True),  # but not what came later
        ({10: 0.1}, [{10: 0.5}], False),
        ({10: 0.1}, [{10: 0.5}, {20: 0.5}], False),
    ],
)
def test_the_median_rule(scores, others, expected):
    assert lags(10, scores, others) is expected


def test_only_trials_of_equal_cost_are_compared():
    axes = [Axis("student", ({}, {"dim": 8})), Axis("data.fraction", (0.5, 1.0)), Axis("train.lr", (), 0.1, 1)]
    one = {"student": {}, "data.fraction": 0.5, "train.lr": 0.2}
    assert comparable(axes, one, one | {"train.lr": 0.9})
    assert not comparable(axes, one, one | {"student": {"dim": 8}})
    assert not comparable(axes, one, one | {"data.fraction": 1.0})
