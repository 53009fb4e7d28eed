"""Live and mutual runs and a budget from the command line, as a user types them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from e2e.test_cli import call, last_json

pytestmark = pytest.mark.slow


def test_a_live_run_with_a_budget_then_search(tmp_path):
    tiny.run_toml(tmp_path)
    live = ("train.mode=live", "cache.views=2", "train.accumulation=2", "train.budget_minutes=0.25")
    report = last_json(call("run", "run.toml", *live, "--json", cwd=tmp_path))
    plan = json.loads((tmp_path / "runs/small/training/plan.json").read_text())
    assert report["budget"]["steps"] == plan["steps"] >= 1
    assert report["budget"]["taken_minutes"] > 0
    assert report["budget"]["planned_minutes"] <= report["budget"]["budget_minutes"] == 0.25
    assert "minutes taken" in (tmp_path / "runs/small/report.html").read_text()
    hits = last_json(call("search", "run.toml", "a red bicycle", *live, "-k", "2", "--json", cwd=tmp_path))
    assert len(hits) == 2
    little = call("train", "run.toml", "train.budget_minutes=0.0001", "--out", "other", cwd=tmp_path)
    assert little.returncode == 2
    assert "train.budget_minutes: 0.0001" in little.stderr and "one evaluation" in little.stderr


def test_a_mutual_run_saves_its_teacher_as_an_open_clip_model(tmp_path):
    import open_clip
    import torch

    from clipdistill.towers.teacher import load_teacher

    tiny.run_toml(tmp_path)
    report = last_json(call("run", "run.toml", "train.mode=mutual", "mutual.lr=0.01", "--json", cwd=tmp_path))
    assert "On test, mutual training" in report["mutual"]["verdict"]
    folder = f"local-dir:{tmp_path / 'runs/small/mutual_teacher'}"
    model, _ = open_clip.create_model_from_pretrained(folder)
    with torch.no_grad():
        texts = model.eval().encode_text(open_clip.get_tokenizer(folder)(["a red cat"]), normalize=True).numpy()
    np.testing.assert_allclose(load_teacher(folder).encode_texts(["a red cat"]), texts, atol=1e-5)
    other = call("train", "run.toml", "train.mode=mutual", 'mutual.freeze=["visul"]', "--out", "other", cwd=tmp_path)
    assert other.returncode == 2
    assert "did you mean 'visual'" in other.stderr
