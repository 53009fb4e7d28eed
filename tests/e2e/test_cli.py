"""The command line as a user meets it: every verb on a small real run, and every exit code."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

pytestmark = pytest.mark.slow


def call(*args, cwd, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "clipdistill", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def last_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A finished run, made by the verbs one after the other."""
    folder = tmp_path_factory.mktemp("small")
    tiny.run_toml(folder)
    return folder


def test_1_inspect_says_what_the_data_hold_and_what_it_will_cost(small):
    done = call("inspect", "run.toml", "--json", cwd=small)
    found = last_json(done)
    assert found["cost"]["picture_passes"] == 42
    assert found["cost"]["text_passes"] == 42
    assert found["cost"]["cache_bytes"] == 2 * 24 * (42 + 42)
    assert found["cost"]["estimated_seconds"] > 0
    assert "42 picture passes" in done.stdout
    assert not (small / "runs/small/cache").exists()


def test_2_the_verbs_one_after_the_other(small):
    cached = last_json(call("cache", "run.toml", "--json", cwd=small))
    assert (cached["pictures"], cached["texts"]) == (42, 42)
    trained = last_json(call("train", "run.toml", "--json", cwd=small))
    assert trained["best_step"] in (2, 4)
    made = last_json(call("index", "run.toml", "--json", cwd=small))
    assert made["vectors"] == 42
    report = last_json(call("evaluate", "run.toml", "--json", cwd=small))
    assert report["schema"] == "clipdistill.run-report/1"
    page = call("report", "run.toml", cwd=small)
    assert page.returncode == 0, page.stderr
    assert (small / "runs/small/report.html").stat().st_size > 10_000


def test_3_search_finds_by_text_and_by_picture(small):
    hits = last_json(call("search", "run.toml", "a red bicycle", "-k", "3", "--json", cwd=small))
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert hits[0]["score"] >= hits[1]["score"] >= hits[2]["score"]
    same = last_json(call("search", "run.toml", "train/p005.png", "-k", "1", "--json", cwd=small))
    assert "p005" in same[0]["key"]
    assert same[0]["score"] == pytest.approx(1, abs=1e-4)
    sentence = "a picture of something, e.g. " + "very " * 60 + "nice"  # longer than a file's name may be
    assert len(last_json(call("search", "run.toml", sentence, "-k", "2", "--json", cwd=small))) == 2
    absent = call("search", "run.toml", "train/p555.PNG", cwd=small)
    assert absent.returncode == 2
    assert "train/p555.PNG: no such picture" in absent.stderr
    assert not absent.stdout


def test_4_run_again_keeps_everything_that_is_done(small):
    before = {path: path.stat().st_mtime_ns for path in (small / "runs/small/student").iterdir()}
    again = call("run", "run.toml", "--json", cwd=small)
    assert last_json(again)["name"] == "small"
    assert "already done" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (small / "runs/small/student").iterdir()} == before


def test_5_the_student_is_a_valid_open_clip_folder(small):
    import open_clip
    import torch

    from clipdistill import DualEncoder

    folder = small / "runs/small/student"
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    own = DualEncoder.load(folder)
    pairs = tiny.pairs(3)
    with torch.no_grad():
        texts = model.eval().encode_text(tokenizer([pair.captions[0] for pair in pairs]), normalize=True).numpy()
    assert (own.encode_texts([pair.captions[0] for pair in pairs]) * texts).sum(axis=1).min() > 0.99999
    assert transform is not None


def test_6_artefacts_of_other_inputs_end_with_4(small, tmp_path):
    changed = call("train", "run.toml", "train.lr=0.001", cwd=small)
    assert changed.returncode == 4
    assert "train does not match: expected" in changed.stderr
    assert "--force" in changed.stderr
    views = call("cache", "run.toml", "cache.views=2", cwd=small)
    assert views.returncode == 4
    assert "views.count does not match: expected 2, found 1" in views.stderr
    other = tiny.teacher_folder(tmp_path / "teacher", seed=9)
    teacher = call("cache", "run.toml", f"teacher.model=local-dir:{other}", cwd=small)
    assert teacher.returncode == 4
    assert "teacher.weights" in teacher.stderr
    weights = small / "runs/small/student/open_clip_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    tampered = call("search", "run.toml", "a cat", cwd=small)
    weights.write_bytes(data)
    assert tampered.returncode == 4
    assert "open_clip_model.safetensors: sha256" in tampered.stderr


def test_a_faulty_configuration_ends_with_2_tells_all_and_writes_nothing(tmp_path):
    tiny.run_toml(tmp_path)
    done = call(
        "run", "run.toml", "train.stpes=3", "teacher.model=ViT-B-23", "student.image=mobilenet_v9", "data.val=gone",
        "train.lr=fast", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    for part in (
        "train.stpes: unknown key; did you mean 'steps'?",
        "teacher.model: unknown model 'ViT-B-23'",
        "student.image: unknown",
        "data.val: no such file or folder: gone",
        "train.lr:",
    ):
        assert part in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()
    assert "Traceback" not in done.stderr
    assert call("run", "nothing.toml", cwd=tmp_path).returncode == 2
    assert call("search", "run.toml", "a cat", cwd=tmp_path).returncode == 2


def test_bad_rows_are_refused_counted_listed_and_fail_above_the_limit(tmp_path):
    tiny.run_toml(tmp_path)
    train = tmp_path / "train"
    (train / "p001.png").write_bytes(tiny.image_bytes(1)[:200])  # its header is whole: it breaks while decoding
    (train / "p002.png").write_bytes(b"")
    (train / "p003.txt").write_bytes(b"caf\xe9")
    (train / "p004.txt").unlink()
    (train / "p005.png").write_text("not a picture")
    strict = call("cache", "run.toml", cwd=tmp_path)
    assert strict.returncode == 2
    assert "data.max_rejected" in strict.stderr
    done = call("run", "run.toml", "data.max_rejected=5", "--json", cwd=tmp_path)
    report = last_json(done)
    assert report["data"]["sets"]["train"]["pictures"] == 19
    rows = [json.loads(line) for line in (tmp_path / "runs/small/rejected.jsonl").read_text().splitlines()]
    assert sorted(row["key"].rsplit("/")[-1].split(".")[0] for row in rows) == ["p001", "p002", "p003", "p004", "p005"]
    assert all(row["reason"] and row["origin"] for row in rows)
    fewer = call("run", "run.toml", "data.max_rejected=4", "--out", "runs/other", cwd=tmp_path)
    assert fewer.returncode == 2
    assert "5" in fewer.stderr


def test_killed_in_training_it_goes_on_and_ends_bit_identical(tmp_path):
    tiny.run_toml(tmp_path)
    steps = ["train.steps=40", "train.save_every=5", "train.eval_every=10"]
    assert call("cache", "run.toml", "cache.folder=shared", cwd=tmp_path).returncode == 0
    whole = last_json(
        call("train", "run.toml", "cache.folder=shared", *steps, "--out", "whole", "--json", cwd=tmp_path)
    )
    command = [sys.executable, "-m", "clipdistill", "train", "run.toml", "cache.folder=shared", *steps, "--out", "cut"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut/training/checkpoints/step-00000010").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut/student").exists()
    cut = last_json(call("train", "run.toml", "cache.folder=shared", *steps, "--out", "cut", "--json", cwd=tmp_path))
    assert cut["fingerprint"] == whole["fingerprint"]
    weights = [(tmp_path / name / "student/open_clip_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_unpaired_pictures_and_texts_alone(tmp_path):
    tiny.run_toml(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(tiny.caption(n) for n in range(20)))
    text = (tmp_path / "run.toml").read_text().replace('train = "train"\n', 'images = "train"\ntexts = "texts.txt"\n')
    text = (
        text.replace("batch = 8\nwarmup", "batch = 0\nbatch_images = 8\nbatch_texts = 8\nwarmup")
        + '[loss]\npreset = "fd"\n'
    )
    (tmp_path / "run.toml").write_text(text)
    report = last_json(call("run", "run.toml", "--json", cwd=tmp_path))
    assert report["data"]["images"] == 24
    refused = call("train", "run.toml", "loss.preset=clip", "--out", "other", cwd=tmp_path)
    assert refused.returncode == 2
    assert "loss.clip needs pictures paired with texts" in refused.stderr


def test_stored_embeddings_serve_as_a_teacher_with_no_model_at_hand(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tiny.run_toml(tmp_path)
    folder, rng = tmp_path / "embeddings", np.random.default_rng(0)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "img_emb/img_emb_0.npy", rng.normal(size=(42, 20)).astype(np.float16))
    np.save(folder / "text_emb/text_emb_0.npy", rng.normal(size=(42, 20)).astype(np.float16))
    paths = [f"elsewhere/p{n:03d}.png" for n in range(42)]
    table = {"image_path": paths, "caption": [tiny.caption(n) for n in range(42)]}
    pq.write_table(pa.table(table), folder / "metadata/metadata_0.parquet")
    text = (tmp_path / "run.toml").read_text()
    text = text.replace('model = "local-dir:teacher"', 'embeddings = "embeddings"\nlogit_scale = 100.0')
    (tmp_path / "run.toml").write_text(text)
    report = last_json(call("run", "run.toml", "student.text_init=random", "--json", cwd=tmp_path))
    assert report["sizes"]["teacher"]["dim"] == 20
    (tmp_path / "test" / "p099.png").write_bytes(tiny.image_bytes(99))
    (tmp_path / "test" / "p099.txt").write_text("a row that has no embedding")
    short = call("run", "run.toml", "student.text_init=random", "--out", "other", cwd=tmp_path)
    assert short.returncode == 4
    assert "data.pictures" in short.stderr and "p099" in short.stderr


def test_a_projection_to_a_wider_teacher_is_saved_with_the_student(tmp_path):
    tiny.run_toml(tmp_path)
    report = last_json(call("run", "run.toml", "student.dim=12", "--json", cwd=tmp_path))
    assert report["sizes"]["student"]["dim"] == 12
    pairings = {row["pairing"] for row in report["evaluation"]["rows"]}
    assert "student_query_teacher_index" in pairings
    assert (tmp_path / "runs/small/student/projection.safetensors").exists()


def test_doctor_and_help_answer(tmp_path):
    checks = call("doctor", "--json", cwd=tmp_path)
    assert {check["name"] for check in json.loads(checks.stdout.splitlines()[-1])} >= {"torch", "faiss-cpu", "python"}
    assert call("--help", cwd=tmp_path).returncode == 0
    assert call("rnu", cwd=tmp_path).returncode == 2
