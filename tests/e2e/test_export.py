"""The verbs ``export`` and ``verify`` as a user meets them."""

import json
import os
import subprocess
import sys

import pytest
import tiny

pytestmark = pytest.mark.slow


def call(*args, cwd):
    return subprocess.run(
        [sys.executable, "-m", "clipdistill", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def last_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_runs_student_is_exported_verified_and_a_changed_file_ends_with_4(tmp_path):
    tiny.run_toml(tmp_path)
    early = call("export", "run.toml", cwd=tmp_path)
    assert early.returncode == 2 and "clipdistill train RUN.toml" in early.stderr
    wrong = call("export", "run.toml", 'export.layouts=["onxn"]', cwd=tmp_path)
    assert wrong.returncode == 2 and "did you mean 'onnx'" in wrong.stderr
    report = last_json(call("run", "run.toml", "--json", cwd=tmp_path))
    made = call("export", "run.toml", "export.licence=MIT", "--json", cwd=tmp_path)
    found = last_json(made)
    assert found["encoder"] == report["student_fingerprint"]
    assert [one["reading"] for one in found["parities"]] == ["open_clip", "onnx/fp32", "onnx/int8"]
    assert all(one["towers"]["image"]["rows"] == 10 for one in found["parities"])
    assert "worst cosine" in made.stdout
    assert found["vectors"] == 42 and found["parities"][1]["recall"]["index_overlap10"] == 1
    folder = tmp_path / "runs/small/export"
    card = (folder / "README.md").read_text()
    assert 'license: "mit"' in card
    table = card.split("## Measured by its run")[1].split("## Parity")[0]
    lines = [line.split(" | ")[:4] for line in table.splitlines() if "_to_" in line]
    assert len(lines) == len({tuple(line) for line in lines}) > 10  # no two say the same of different figures
    exact = [row for row in report["evaluation"]["rows"] if row["search"] == "exact" and row["pairing"] == "student"]
    (ten,) = (row for row in exact if (row["direction"], row["measure"], row["k"]) == ("text_to_image", "success", 10))
    assert f"| test | text_to_image | student | success@10 | {ten['value']:.4f} |" in table
    assert call("verify", folder, cwd=tmp_path).returncode == 0
    data = (folder / "onnx/vision_model.onnx").read_bytes()
    (folder / "onnx/vision_model.onnx").write_bytes(data[:-100])
    tampered = call("verify", folder, cwd=tmp_path)
    assert tampered.returncode == 4
    assert "onnx/vision_model.onnx: sha256 does not match: expected" in tampered.stderr
    assert "Traceback" not in tampered.stderr
    noted = tmp_path / "runs/small/index/manifest.json"
    noted.write_text(noted.read_text().replace(report["student_fingerprint"], "f" * 64))
    foreign = call("export", "run.toml", "--to", "other", cwd=tmp_path)
    assert foreign.returncode == 4 and not (tmp_path / "other").exists()
    assert all(part in foreign.stderr for part in ("f" * 64, report["student_fingerprint"], "clipdistill index"))
    elsewhere = call("export", "run.toml", "--to", "train", cwd=tmp_path)
    assert elsewhere.returncode == 2 and "left alone" in elsewhere.stderr
    assert (tmp_path / "train/p000.png").exists()
