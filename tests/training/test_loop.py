from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from training import little

from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError, DataError
from clipdistill.data.records import Pair, Picture
from clipdistill.training import loop
from clipdistill.training import step as steps
from clipdistill.training.batches import TrainingData
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(12))
DATA = TrainingData(PAIRS)


def run(student=None, data=DATA, *, objective=None, seed=5, views=1, on_eval=None, folder=None, on_log=None, **train):
    student = student or little.student()
    return distill(
        student,
        little.Teacher(data.pairs, views),
        data,
        objective=objective or little.objective(),
        train=little.settings(**train),
        seed=seed,
        on_eval=on_eval,
        folder=folder,
        on_log=on_log,
    )


def weights(student) -> str:
    return fingerprint.of_tensors(student.module.state_dict())


def cosines(student) -> tuple[float, float]:
    """Mean cosine of the student's embeddings of the data with the teacher's rows."""
    teacher = little.Teacher()
    texts = [text for pair in PAIRS for text in pair.captions]
    images = student.to_teacher_vectors(student.encode_images([pair.picture for pair in PAIRS]), "image")
    words = student.to_teacher_vectors(student.encode_texts(texts), "text")
    rows = teacher.image_rows([pair.key for pair in PAIRS], [0] * len(PAIRS))
    return float((images * rows).sum(1).mean()), float((words * teacher.text_rows(texts)).sum(1).mean())


def test_a_student_learns_its_teachers_embeddings():
    student = little.student()
    assert max(cosines(student)) < 0.3
    lines = []
    trained = run(student, steps=120, batch=12, lr=1e-2, log_every=40, eval_every=1000, on_log=lines.append)
    assert trained is student
    assert min(cosines(student)) > 0.65
    assert [line["step"] for line in lines] == [40, 80, 120]
    assert lines[0]["loss"] > lines[-1]["loss"]
    assert set(lines[0]) == {
        *("step", "epoch", "loss", "clip", "affinity", "feature_image", "feature_text", "interactive"),
        *(
            "lr",
            "lr_image",
            "lr_head",
            "lr_text",
            "grad_norm",
            "rejected",
            "samples_per_s",
            "data_seconds",
            "compute_seconds",
        ),
    }
    assert lines[0]["epoch"] == 40
    assert lines[-1]["feature_image"] < 0.25


def test_the_scale_that_was_learned_is_the_students():
    objective = little.objective()
    student = run(objective=objective)
    assert student.model.logit_scale.exp().item() == pytest.approx(objective.scale())
    assert objective.scale() != pytest.approx(1 / 0.07, rel=1e-6)


def test_a_siglip_objectives_bias_is_the_students_and_survives_the_checkpoints(tmp_path):
    objective = little.objective(siglip=1.0)
    student = run(objective=objective, folder=tmp_path, ema=0.5)
    assert student.model.logit_bias.item() == pytest.approx(objective.bias())
    again = little.objective(siglip=1.0)
    assert weights(run(objective=again, folder=tmp_path, ema=0.5)) == weights(student)


def test_neither_the_ambient_randomness_nor_torchs_switches_matter_or_change():
    before = torch.get_num_threads()
    torch.manual_seed(1)
    one = run(little.student(drop=0.3), threads=1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = run(little.student(drop=0.3), threads=1)
    assert weights(one) == weights(two)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert weights(run(little.student(drop=0.3), seed=6)) != weights(one)


def test_the_settings_hold_inside_and_are_put_back_after_a_failure():
    found = {}

    def on_eval(student, step):
        found.update(threads=torch.get_num_threads(), deterministic=torch.are_deterministic_algorithms_enabled())
        raise RuntimeError("from the evaluation")

    before = torch.get_num_threads()
    student = little.student()
    with pytest.raises(RuntimeError, match="from the evaluation"):
        run(student, threads=3, on_eval=on_eval, freeze=("visual",))
    assert found == {"threads": 3, "deterministic": True}
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(value.requires_grad for value in student.model.visual.parameters())


def test_workers_change_no_bit(tmp_path):
    data = TrainingData((*PAIRS, little.broken("bad")))
    alone = run(data=data, views=2, folder=tmp_path / "alone", batch=8)
    helped = run(data=data, views=2, folder=tmp_path / "helped", batch=8, workers=2)
    assert weights(alone) == weights(helped)
    assert (tmp_path / "alone/rejected.jsonl").read_text() == (tmp_path / "helped/rejected.jsonl").read_text() != ""


def test_a_run_without_pairs_trains_both_towers():
    data = TrainingData((), (), PAIRS, tuple(text for pair in PAIRS for text in pair.captions))
    lines = []
    student = little.student()
    before = cosines(student)
    run(
        student,
        data,
        objective=little.objective(feature_cosine=1.0),
        batch=0,
        batch_images=8,
        batch_texts=8,
        steps=40,
        lr=1e-2,
        on_log=lines.append,
    )
    assert min(np.subtract(cosines(student), before)) > 0.2
    assert {"feature_image", "feature_text"} < set(lines[0])


@pytest.mark.parametrize(("images", "texts", "still"), [(0, 8, "visual"), (8, 0, "text")])
def test_a_run_on_one_modality_leaves_the_other_tower_alone(images, texts, still):
    data = TrainingData((), (), PAIRS, PAIRS[0].captions)
    student = little.student()
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    objective = little.objective(feature_cosine=1.0)
    run(student, data, objective=objective, batch=0, batch_images=images, batch_texts=texts, folder=None)
    moved = {
        name.split(".")[0] for name, value in student.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert still not in moved
    assert moved - {"logit_scale"}


def test_an_objective_that_needs_pairs_is_refused_without_them():
    with pytest.raises(ConfigError, match=r'loss\.preset = "fd"'):
        run(data=TrainingData((), (), PAIRS), objective=little.objective(clip=1.0), batch=0, batch_images=4)


def test_accumulation_averages_the_gradients_of_the_parts():
    # Means over rows and a tower without batch norm: two equal parts must give the whole's gradient.
    def gradients(parts):
        found = {}

        def step(self, *arguments):
            found.update(
                {name: value.grad for name, value in student.module.named_parameters() if value.grad is not None}
            )

        student = little.student("test_vit")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            objective = little.objective(feature_cosine=1.0)
            run(student, objective=objective, batch=8, batch_texts=4, accumulation=parts, steps=1, grad_clip=0.0)
        return found

    one, two, four = gradients(1), gradients(2), gradients(4)
    assert len(one) > 30
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(four[name], value, atol=1e-6, rtol=1e-4)


def test_accumulated_parts_contrast_within_themselves():
    lines = []
    for parts in (1, 2):
        run(objective=little.objective(clip=1.0), accumulation=parts, steps=1, on_log=lines.append)
    assert lines[1]["clip"] < lines[0]["clip"]  # 3 candidates instead of 6


def test_frozen_parameters_and_their_batch_norms_do_not_move():
    student = little.student()
    before = {name: value.clone() for name, value in student.model.visual.state_dict().items()}
    run(student, freeze=("visual.trunk.conv_stem", "visual.trunk.bn1", "visual.trunk.blocks.0"))
    after = student.model.visual.state_dict()
    frozen = [name for name in before if name.startswith(("trunk.conv_stem", "trunk.bn1", "trunk.blocks.0"))]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    others = [name for name in before if name not in frozen and "running_mean" in name]
    assert others
    assert not any(torch.equal(before[name], after[name]) for name in others)


def test_an_unknown_name_to_freeze_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'visual.trunk.conv_stim'; did you mean 'visual.trunk.conv_stem'"):
        run(freeze=("visual.trunk.conv_stim",))


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match=r"train\.freeze: nothing is left to train"):
        run(little.student(dim=little.TEACHER_DIM), freeze=("visual", "text"))


@pytest.mark.parametrize("wanted", ["bf16", "fp16"])
def test_half_precision_on_a_cpu_is_refused(wanted):
    with pytest.raises(ConfigError, match=r"3\.4 times slower"):
        run(precision=wanted)


def test_the_average_is_what_is_evaluated_and_kept():
    own, seen = [], []
    student = little.student()
    shadow = {name: value.clone() for name, value in student.module.state_dict().items()}
    original = loop.take_step

    def step(run, batch):
        outcome = original(run, batch)
        own.append({name: value.clone() for name, value in run.state.module.state_dict().items()})
        decay = min(0.8, (1 + batch.step) / (10 + batch.step))
        for name, value in own[-1].items():
            shadow[name] = shadow[name] * decay + value * (1 - decay) if value.is_floating_point() else value
        return outcome

    def on_eval(student, step):
        for name, value in student.module.state_dict().items():
            if "logit" not in name:
                torch.testing.assert_close(value, shadow[name], msg=name)
        seen.append(step)
        return {"score": float(step)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", step)
        run(student, ema=0.8, on_eval=on_eval)
    assert seen == [3, 6, 8]
    final = student.module.state_dict()
    assert all(torch.allclose(final[name], shadow[name], atol=1e-6) for name in shadow if "logit" not in name)
    assert not all(torch.equal(final[name], own[-1][name]) for name in final)


def test_the_student_is_evaluated_in_eval_mode_and_trained_in_training_mode():
    modes = []
    original = steps._losses

    def on_eval(student, step):
        modes.append(student.module.training)
        return {"score": 1.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            steps, "_losses", lambda run, batch: modes.append(run.state.module.training) or original(run, batch)
        )
        student = run(steps=4, eval_every=2, on_eval=on_eval)
    assert modes == [True, True, False, True, True, False]
    assert not student.module.training


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.3, 0.2], 6), ([0.3, 0.3, 0.3], 3), ([0.1, 0.2, 0.3], 8), ([-2.0, -1.0, -1.5], 6)]
)
def test_the_best_by_score_is_returned_and_of_equals_the_earliest(scores, best, tmp_path):
    left, kept, lines = list(scores), {}, []

    def on_eval(student, step):
        kept[step] = student.fingerprint
        return {"score": left.pop(0), "other": 7}

    student = run(on_eval=on_eval, folder=tmp_path, on_log=lines.append)
    assert student.fingerprint == kept[best]
    assert len(set(kept.values())) == 3
    manifest = json.loads((tmp_path / "best.json").read_text())
    assert (manifest["step"], manifest["score"]) == (best, max(scores))
    scored = [line for line in lines if "score" in line]
    assert scored == [{"step": step, "score": score, "other": 7} for step, score in zip((3, 6, 8), scores, strict=True)]


def test_without_an_evaluation_the_last_is_kept(tmp_path):
    student = run(folder=tmp_path)
    manifest = json.loads((tmp_path / "best.json").read_text())
    assert (manifest["step"], manifest["score"]) == (8, None)
    assert weights(run()) == weights(student)


@pytest.mark.parametrize("values", [{}, {"score": math.nan}])
def test_an_evaluation_without_a_finite_score_is_refused(values):
    with pytest.raises(DataError, match="finite 'score'"):
        run(on_eval=lambda student, step: values)


class Poisoned(little.Teacher):
    """Gives a row that is not finite for some keys."""

    def image_rows(self, keys, views):
        rows = super().image_rows(keys, views)
        rows[[key in ("row/003", "row/007") for key in keys]] = math.inf
        return rows


def poisoned(student, *, on_log=None, folder=None, **train):
    settings = little.settings(**({"steps": 6, "batch": 2, "save_every": 1} | train))
    return distill(
        student,
        Poisoned(PAIRS),
        DATA,
        objective=little.objective(feature_cosine=1.0),
        train=settings,
        seed=1,
        on_log=on_log,
        folder=folder,
    )


def test_a_step_that_is_not_finite_is_skipped_and_leaves_no_trace(caplog):
    lines, states = [], []
    original = loop.take_step

    def step(run, batch):
        before = weights(run.student)
        outcome = original(run, batch)
        states.append(
            (outcome.finite, before == weights(run.student), "row/003" in batch.keys or "row/007" in batch.keys)
        )
        return outcome

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "clipdistill"):
        patch.setattr(loop, "take_step", step)
        poisoned(little.student(), on_log=lines.append)
    assert sorted(set(states)) == [(False, True, True), (True, False, False)]
    skipped = [line for line in lines if "skipped" in line]
    assert [line["skipped"] for line in skipped] == list(range(1, len(skipped) + 1))
    assert all({"row/003", "row/007"} & set(line["keys"]) for line in skipped)
    assert len(lines) == 6
    json.dumps(lines, allow_nan=False)
    assert "skipped (1 so far, 10 allowed)" in caplog.text


def test_too_many_skipped_steps_end_the_run_with_the_last_good_checkpoint_named(tmp_path):
    with pytest.raises(DataError, match=r"max_skipped = 1.*last good checkpoint is .*step-0000000\d.*row/00[37]"):
        poisoned(little.student(), folder=tmp_path, steps=12, max_skipped=1)


def test_unreadable_pictures_are_recorded_once_and_the_run_goes_on(tmp_path, caplog):
    data = TrainingData((*PAIRS, little.broken("bad")))
    lines = []
    with caplog.at_level(logging.WARNING, "clipdistill"):
        run(data=data, folder=tmp_path, batch=13, on_log=lines.append, steps=3)
    (record,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert record["key"] == "bad"
    assert record["origin"] == "broken bad"
    assert caplog.text.count("picture bad cannot be read") == 1
    assert [line["rejected"] for line in lines] == [1, 1, 1]


def test_more_unreadable_pictures_than_a_twentieth_of_the_batch_end_the_run():
    data = TrainingData((*PAIRS, little.broken("bad"), little.broken("worse")))
    with pytest.raises(DataError, match=r"step 1: 2 of 14 pictures cannot be read, the first (bad|worse) \(broken"):
        run(data=data, batch=14)
    with pytest.raises(DataError, match="1 of 1 pictures"):
        run(data=TrainingData((little.broken("bad"),)), batch=1)


def test_the_gradient_is_clipped_and_its_norm_before_that_logged():
    norms = []
    student = little.student()
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        gradients = [value.grad for group in self.param_groups for value in group["params"] if value.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
        return original(self, *arguments)

    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        run(student, steps=3, grad_clip=0.01, on_log=lines.append)
        assert norms == pytest.approx([0.01] * 3, rel=1e-3)
        run(steps=3, grad_clip=0.0, on_log=lines.append)
    assert lines[0]["grad_norm"] == lines[3]["grad_norm"]
    assert norms[3:] == pytest.approx([line["grad_norm"] for line in lines[3:]], rel=1e-5)


def test_the_rates_follow_the_schedule_tower_by_tower():
    rates, lines = [], []
    original = torch.optim.AdamW.step

    def step(self, *arguments):
        rates.append({group["full_lr"]: group["lr"] for group in self.param_groups})
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        run(steps=4, warmup=2, lr=1.0, lr_image=1e-3, lr_text=1e-4, final_lr=0.5, on_log=lines.append)
    shares = [0.5, 1.0, 0.5 + 0.5 * (1 + math.cos(math.pi / 2)) / 2, 0.5]
    for found, line, share in zip(rates, lines, shares, strict=True):
        assert found == {
            1.0: pytest.approx(share),
            1e-3: pytest.approx(share * 1e-3),
            1e-4: pytest.approx(share * 1e-4),
        }
        assert (line["lr"], line["lr_image"], line["lr_text"]) == pytest.approx((share, share * 1e-3, share * 1e-4))


def test_a_picture_changed_since_the_cache_is_refused_in_the_middle_of_a_run(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(tiny.image_bytes(99))
    data = TrainingData((*PAIRS[:5], Pair("changing", Picture("picture.png", path=path), ("a text",))))

    def on_log(line):
        if line["step"] == 2:
            path.write_bytes(tiny.image_bytes(98))

    with pytest.raises(ValueError, match=r"changing \(picture\.png\)"):
        run(data=data, on_log=on_log, views=3)


def test_the_loop_writes_nothing_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(on_eval=lambda student, step: {"score": 1.0})
    assert list(Path.cwd().iterdir()) == []


def test_the_objective_is_a_module_that_trains_with_the_student():
    objective = little.objective()
    before = {name: value.clone() for name, value in objective.named_parameters()}
    run(objective=objective)
    moved = {name for name, value in objective.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"logit_scale", "icl_scale"}
    assert isinstance(objective, nn.Module)


def test_the_folder_may_be_a_string(tmp_path):
    student = run(steps=2, folder=str(tmp_path / "training"))
    assert (tmp_path / "training" / "metrics.jsonl").is_file()
    assert weights(student) == weights(run(steps=2))
