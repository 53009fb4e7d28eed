from __future__ import annotations

import json

import pytest
import tiny

from clipdistill.config import RunConfig
from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.stages.mutual import verdict
from clipdistill.stages.run import run
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.teacher import load_teacher

MUTUAL = ("train.mode=mutual", "train.threads=1", "mutual.lr=0.01", "cache.views=2")


def workspace(folder, *overrides, out="out"):
    path = folder / "run.toml"
    if not path.exists():
        tiny.run_toml(folder)
    return Workspace(RunConfig.load(path, [*MUTUAL, *overrides]), folder / out)


@pytest.mark.slow
def test_a_mutual_run_leaves_both_and_reports_what_became_of_them(tmp_path):
    made = workspace(tmp_path)
    report = run(made)
    before, after = load_teacher(f"local-dir:{tmp_path / 'teacher'}"), load_teacher(f"local-dir:{made.mutual}")
    assert after.parts["weights"] != before.parts["weights"]
    assert after.parts["tokenizer"] == before.parts["tokenizer"]
    found = report["mutual"]["sets"]["test"]
    rows = {(row["pairing"], row["measure"]): row for row in report["evaluation"]["rows"] if _is_main(row)}
    assert found["before"]["value"] == rows["teacher", "success"]["value"]
    assert found["student"] == {name: rows["student", "success"][name] for name in ("value", "low", "high")}
    assert found["kept"]["value"] == pytest.approx(found["after"]["value"] / found["before"]["value"])
    page = made.report_html.read_text()
    assert "Teacher and student trained together" in page
    assert "On test, mutual training" in page
    lines = [json.loads(line) for line in (made.training / "metrics.jsonl").read_text().splitlines()]
    assert all(
        {"teacher_loss", "teacher_task", "teacher_kl", "lr_teacher"} < set(line) for line in lines if "loss" in line
    )
    assert run(made) == report
    with pytest.raises(MismatchError, match="mutual does not match"):
        run(workspace(tmp_path, "mutual.weight=2.0"))
    digest = fingerprint.of_file(made.mutual / "open_clip_model.safetensors")
    for path in sorted(made.mutual.iterdir()):
        path.unlink()
    made.mutual.rmdir()  # a kill between the student and its teacher, or a user's hand: it is written again
    run(made, until="train")
    assert fingerprint.of_file(made.mutual / "open_clip_model.safetensors") == digest


def _is_main(row):
    return row["direction"] == "text_to_image" and row["search"] == "exact" and row["k"] == 10


def test_a_part_that_does_not_exist_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"mutual\.freeze: .*'visul'; did you mean 'visual'"):
        run(workspace(tmp_path, 'mutual.freeze=["visul"]'), until="train")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.01, 1.2, "improved the teacher's"),
        (0.8, 0.99, "worsened the"),
        (0.9, 1.1, "did not change"),
        (None, None, "did not"),
    ],
)
def test_the_verdict_follows_the_interval(low, high, words):
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    sets = {
        "test": {"before": figure, "after": figure, "student": figure, "kept": {"value": 1.0, "low": low, "high": high}}
    }
    assert f"On test, mutual training {words}" in verdict(sets)
    assert "benchmarks/mutual.py" in verdict({})
