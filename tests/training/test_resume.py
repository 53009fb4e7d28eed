from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training import killed, little

from clipdistill.core import fingerprint
from clipdistill.core.errors import MismatchError
from clipdistill.towers.student import DualEncoder
from clipdistill.training.loop import distill

pytestmark = pytest.mark.slow
TIMES = ("samples_per_s", "data_seconds", "compute_seconds")
CUTS = ("line-1", "line-5", "torn-2", "torn-4", "best-6", "line-9", "torn-10", "outside-7")


def metrics(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def newest(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensors of the last checkpoint, by kind of state, and of its plain values."""
    path = sorted((folder / "checkpoints").glob("step-*"))[-1]
    digests = {file.name: fingerprint.of_tensors(load_file(file)) for file in path.glob("*.safetensors")}
    return digests | {"name": path.name, "state": (path / "state.json").read_text()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted training: its folder, its student and its objective."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *killed.train(folder)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The same training, killed at each of the cuts."""
    root = tmp_path_factory.mktemp("cut")
    here = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, killed.__file__, str(root), *CUTS], check=True, env=environment, timeout=600)
    return root


def assert_same_run(folder: Path, trained: tuple[DualEncoder, object], whole) -> None:
    reference, student, objective = whole
    assert trained[0].fingerprint == student.fingerprint
    assert fingerprint.of_tensors(trained[0].module.state_dict()) == fingerprint.of_tensors(student.module.state_dict())
    assert fingerprint.of_tensors(trained[1].state_dict()) == fingerprint.of_tensors(objective.state_dict())
    assert newest(folder) == newest(reference)
    assert metrics(folder) == metrics(reference)
    assert json.loads((folder / "best.json").read_text())["step"] == 6
    assert DualEncoder.load(folder / "best").fingerprint == student.fingerprint
    assert not list(folder.rglob(".partial-*"))


def test_the_uninterrupted_run_keeps_its_best(whole):
    folder, student, _ = whole
    assert json.loads((folder / "best.json").read_text())["step"] == 6
    assert [line["step"] for line in metrics(folder) if "score" in line] == [3, 6, 9, 10]
    assert [line["step"] for line in metrics(folder) if "loss" in line] == list(range(1, 11))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]
    assert not student.module.training


def test_the_same_run_twice_gives_the_same_bits(whole, tmp_path):
    assert_same_run(tmp_path, killed.train(tmp_path), whole)


def test_without_a_folder_the_bits_are_the_same(whole):
    student, objective = killed.train(None)
    assert student.fingerprint == whole[1].fingerprint
    assert fingerprint.of_tensors(objective.state_dict()) == fingerprint.of_tensors(whole[2].state_dict())


@pytest.mark.parametrize("name", CUTS)
def test_a_killed_run_goes_on_to_the_same_bits(name, cut, whole):
    folder = cut / name
    before = {path.name for path in (folder / "checkpoints").glob("step-*")} if name != "line-1" else set()
    steps = []
    trained = killed.train(folder, on_log=lambda line: steps.append(line["step"]))
    assert steps[0] == max((int(path.removeprefix("step-")) for path in before), default=0) + 1
    assert_same_run(folder, trained, whole)


@pytest.mark.parametrize(
    "damage",
    ["manifest.json", "model.safetensors", "optimizer.safetensors", "average.safetensors", "best.safetensors"],
)
@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_damaged_newest_checkpoint_costs_steps_but_no_bits(damage, how, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    path = folder / "checkpoints" / "step-00000010" / damage
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    steps = []
    trained = killed.train(folder, on_log=lambda line: steps.append(line["step"]))
    assert steps == [10, 10]  # the step, and its evaluation
    assert_same_run(folder, trained, whole)


def test_a_finished_run_returns_at_once(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    before.pop(folder / "rejected.jsonl")

    def never(*arguments):
        raise AssertionError("a step was repeated")

    trained = killed.train(folder, on_eval=never, on_log=never)
    assert_same_run(folder, trained, whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("loss", ["best.json", "best", "a file of best", "another best"])
def test_a_damaged_best_student_is_written_again(loss, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    if loss == "best.json":
        (folder / "best.json").unlink()
    elif loss == "best":
        shutil.rmtree(folder / "best")
    elif loss == "a file of best":
        (folder / "best" / "tokenizer.json").write_text("{}")
    else:
        little.student(seed=3).save(folder / "best")
    assert_same_run(folder, killed.train(folder), whole)


def test_another_runs_checkpoint_is_refused(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    manifest = folder / "checkpoints" / "step-00000010" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fingerprint": "run"', '"fingerprint": "another"'))
    with pytest.raises(MismatchError, match="expected run, found another"):
        killed.train(folder)


def test_not_resuming_starts_from_nothing_and_leaves_other_files_alone(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    (folder / "notes.txt").write_text("mine")
    steps = []
    trained = killed.train(folder, resume=False, on_log=lambda line: steps.append(line["step"]))
    assert steps[0] == 1
    assert_same_run(folder, trained, whole)
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_a_checkpoint_of_another_student_is_refused(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    arguments = {"train": little.settings(steps=10, ema=0.9), "seed": 5, "folder": folder, "fingerprint": "run"}
    with pytest.raises(MismatchError, match=r"model\.visual"):
        distill(
            little.student("test_vit"),
            little.Teacher(killed.PAIRS),
            killed.DATA,
            objective=little.objective(),
            **arguments,
        )


def test_a_run_that_is_shorter_than_its_checkpoint_is_refused(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    arguments = {"train": little.settings(steps=4, ema=0.9), "seed": 5, "folder": folder, "fingerprint": "run"}
    with pytest.raises(MismatchError, match="at most 4, found 10"):
        distill(little.student(), little.Teacher(killed.PAIRS), killed.DATA, objective=little.objective(), **arguments)
