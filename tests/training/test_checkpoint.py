from __future__ import annotations

import json
import logging

import pytest
import torch

from clipdistill.core.errors import MismatchError
from clipdistill.training import checkpoint
from clipdistill.training.checkpoint import Checkpoint


def at(step: int) -> Checkpoint:
    torch.manual_seed(step)
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tied = torch.randn(3)
    tensors = {
        "model": {"conv": channels_last, "tied": tied, "tied too": tied, "count": torch.tensor(step)},
        "optimizer": {},
        "objective": {"logit_scale": torch.tensor(2.5)},
    }
    return Checkpoint(step, tensors, {"skipped": 2, "best": {"step": 1, "score": 0.1 + 0.2}})


def assert_equal(found: Checkpoint, want: Checkpoint) -> None:
    assert found.step == want.step
    assert found.values == want.values
    assert set(found.tensors) == set(want.tensors)
    for kind, tensors in want.tensors.items():
        assert set(found.tensors[kind]) == set(tensors)
        for name, value in tensors.items():
            assert torch.equal(found.tensors[kind][name], value)


def test_what_is_read_is_what_was_written(tmp_path):
    folder = checkpoint.save(tmp_path, at(200), "run A")
    assert folder.name == "step-00000200"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "objective.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((folder / "manifest.json").read_text())["fingerprint"] == "run A"
    assert_equal(checkpoint.newest(tmp_path, "run A"), at(200))


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "not there", "") is None


def test_the_newest_two_are_kept_by_number_not_by_name(tmp_path):
    for step in (5, 100_000_000, 99_999_999, 100_000_001):
        checkpoint.save(tmp_path, at(step), "")
    assert {path.name for path in tmp_path.iterdir()} == {"step-100000000", "step-100000001"}
    assert checkpoint.newest(tmp_path, "").step == 100_000_001


def test_another_runs_checkpoint_is_refused_with_both_fingerprints_and_left_alone(tmp_path):
    checkpoint.save(tmp_path, at(1), "run A")
    with pytest.raises(MismatchError, match=r"expected run B, found run A"):
        checkpoint.newest(tmp_path, "run B")
    assert checkpoint.newest(tmp_path, "run A").step == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def unlink(path):
    path.unlink()


FILES = ("model.safetensors", "optimizer.safetensors", "objective.safetensors", "state.json", "manifest.json")


DAMAGES = [(name, damage) for name in FILES for damage in (truncate, flip, unlink)]
DAMAGES.remove(("manifest.json", flip))  # its last byte is a line feed, which does not matter


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(tmp_path, caplog, name, damage):
    checkpoint.save(tmp_path, at(1), "run")
    checkpoint.save(tmp_path, at(2), "run")
    damage(tmp_path / "step-00000002" / name)
    with caplog.at_level(logging.WARNING, "clipdistill"):
        assert_equal(checkpoint.newest(tmp_path, "run"), at(1))
    assert "step-00000002 is damaged" in caplog.text
    checkpoint.save(tmp_path, at(3), "run")  # the damaged one must not push out the good one
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000003"}


def test_all_damaged_is_none(tmp_path):
    checkpoint.save(tmp_path, at(1), "run")
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path, "run") is None


def test_a_kill_while_writing_leaves_nothing_that_is_taken_for_a_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, at(1), "run")
    aside = tmp_path / ".partial-step-00000002-abc"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path, "run").step == 1
    assert not aside.exists()

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.manifest, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, at(2), "run")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_holds_no_pickle(tmp_path):
    folder = checkpoint.save(tmp_path, at(1), "run")
    for path in folder.iterdir():
        assert path.suffix in (".safetensors", ".json")
