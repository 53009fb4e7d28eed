from __future__ import annotations

import pytest
import tiny
import torch
from training import little

from clipdistill.core import fingerprint
from clipdistill.core.errors import ConfigError
from clipdistill.training import numerics
from clipdistill.training.batches import TrainingData
from clipdistill.training.loop import distill

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert numerics.choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert numerics.choose_device("auto") == CUDA


@pytest.mark.parametrize(("name", "match"), [("gpu", "'gpu' is not a device"), ("cuda", "finds no CUDA device")])
def test_a_device_that_is_not_there_is_refused(name, match, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=match):
        numerics.choose_device(name)


def test_half_precision_is_chosen_only_where_the_device_computes_it(monkeypatch):
    assert numerics.choose_precision("auto", CPU) == "fp32"
    assert numerics.choose_precision("fp32", CPU) == "fp32"
    for supported, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert numerics.choose_precision("auto", CUDA) == chosen
        assert numerics.choose_precision("fp16", CUDA) == "fp16"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes_to_the_same_bits(precision, monkeypatch, tmp_path):
    # Refused by name on a CPU because it is slow there; forced here, it is the same code that CUDA runs.
    monkeypatch.setattr(numerics, "choose_precision", lambda wanted, device: precision)
    pairs = tuple(tiny.pairs(8))
    dtypes = set()

    def run(folder, until=10**9):
        student = little.student("test_vit")
        student.model.visual.trunk.blocks[0].attn.qkv.register_forward_hook(
            lambda part, inputs, output: dtypes.add(output.dtype) if torch.is_grad_enabled() else None
        )

        def on_log(line):
            if line["step"] == until:
                raise KeyboardInterrupt

        return distill(
            student,
            little.Teacher(pairs),
            TrainingData(pairs),
            objective=little.objective(),
            train=little.settings(steps=5),
            seed=1,
            folder=folder,
            on_log=on_log,
        )

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", until=3)
    assert fingerprint.of_tensors(run(tmp_path / "cut").module.state_dict()) == fingerprint.of_tensors(
        whole.module.state_dict()
    )
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert all(value.dtype == torch.float32 for value in whole.module.parameters())


def test_an_overflow_of_fp16_lowers_the_scale_and_is_not_counted_as_a_skipped_step(monkeypatch):
    monkeypatch.setattr(numerics, "choose_precision", lambda wanted, device: "fp16")
    monkeypatch.setattr(numerics, "_FIRST_SCALE", 2.0**30)
    pairs = tuple(tiny.pairs(8))
    lines = []
    distill(
        little.student("test_vit"),
        little.Teacher(pairs),
        TrainingData(pairs),
        objective=little.objective(),
        train=little.settings(steps=25, max_skipped=0),
        seed=1,
        on_log=lines.append,
    )
    skipped = [line for line in lines if "skipped" in line]
    assert 0 < len(skipped) < 25
    assert {line["skipped"] for line in skipped} == {0}
    assert all(line["skipped_loss"] is not None for line in skipped)
