from __future__ import annotations

import pytest
import tiny

from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.stages.inputs import load_data, open_cache
from clipdistill.stages.run import run
from clipdistill.stages.teachers import open_teachers
from clipdistill.stages.workspace import Workspace


def workspace(folder, *overrides, out="out"):
    path = folder / "run.toml"
    if not path.exists():
        tiny.run_toml(folder)
    made = Workspace(RunConfig.load(path, ["train.threads=1", *overrides]), folder / out)
    made.begin()
    return made


def opened(made):
    data = load_data(made)
    return data, *open_cache(made, data, open_teachers(made.config))


def test_only_what_is_measured_is_stored(tmp_path):
    data, cache, kept = opened(workspace(tmp_path, "train.mode=live", "cache.views=3"))
    assert (cache.facts["pictures"], cache.facts["texts"], cache.views) == (18, 18, 1)
    assert all(cache.has_image(pair.key) for name in ("val", "test") for pair in data.sets[name].pairs)
    assert not any(cache.has_image(pair.key) for pair in data.sets["train"].pairs)
    assert len(kept.pairs) == 42
    again = opened(workspace(tmp_path, "train.mode=live"))[1]  # its own views are nobody's
    assert again.fingerprint == cache.fingerprint


def test_the_training_set_is_stored_where_it_is_measured_too(tmp_path):
    _, cache, _ = opened(workspace(tmp_path, "train.mode=live", 'evaluate.sets=["train"]'))
    assert cache.facts["pictures"] == 42


def test_a_whole_cache_serves_a_live_run_but_not_the_other_way_round(tmp_path):
    opened(workspace(tmp_path, "cache.folder=whole", "cache.views=2"))
    assert opened(workspace(tmp_path, "cache.folder=whole", "train.mode=live"))[1].facts["pictures"] == 42
    opened(workspace(tmp_path, "cache.folder=part", "train.mode=live"))
    with pytest.raises(MismatchError, match=r"data\.pictures does not match: expected rows for all 42, found 18"):
        opened(workspace(tmp_path, "cache.folder=part"))


def test_a_changed_measured_picture_is_noticed(tmp_path):
    opened(workspace(tmp_path, "train.mode=live"))
    (tmp_path / "test" / "p033.png").write_bytes(tiny.image_bytes(1, (50, 50)))
    with pytest.raises(MismatchError, match="p033"):
        opened(workspace(tmp_path, "train.mode=live"))


@pytest.mark.slow
def test_a_live_run_goes_from_end_to_end_and_is_bound_to_its_teacher_and_views(tmp_path):
    live = ("train.mode=live", "cache.views=2", "train.accumulation=2", "cache.folder=part")
    report = run(workspace(tmp_path, *live))
    assert {row["set"] for row in report["evaluation"]["rows"]} == {"test"}
    assert report["evaluation"]["rows"][0]["pairing"] == "teacher"
    assert (tmp_path / "out/report.html").exists()
    assert run(workspace(tmp_path, *live)) == report
    with pytest.raises(MismatchError, match="views does not match"):
        run(workspace(tmp_path, *live, "cache.view_seed=4"))
    whole = run(workspace(tmp_path, *live, out="again"), until="train")
    assert whole["fingerprint"] == report["student_fingerprint"]
    other = run(workspace(tmp_path, *live, "cache.view_seed=4", out="other"), until="train")
    assert other["fingerprint"] != report["student_fingerprint"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.mode=live", "teacher={embeddings = 'train', logit_scale = 1.0}"),
            'teacher.embeddings: train.mode = "live" runs the teacher, and embeddings are no teacher to run',
        ),
        (("train.mode=mutual", "teacher.precision=fp16"), "teacher.precision: .* in fp32, not in fp16"),
        (("train.mode=mutual", "train.batch=0", "train.batch_texts=4"), "train.batch: .* needs pairs"),
        (
            (
                "train.mode=mutual",
                "teacher={members = [{model = 'a', pretrained = 'b'}, {embeddings = 'train', logit_scale = 1.0}]}",
            ),
            r"(?s)teacher.members.1: train.mode = \"mutual\" runs the teacher.*teacher.members: .*give teacher.model",
        ),
    ],
)
def test_a_teacher_that_cannot_run_is_refused(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        workspace(tmp_path, *overrides)
