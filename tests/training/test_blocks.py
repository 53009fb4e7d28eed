from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F
from training import little

from clipdistill.cache.blocks import fact_name
from clipdistill.core import fingerprint
from clipdistill.core.errors import MismatchError
from clipdistill.losses.objective import Embeddings
from clipdistill.training.batches import TrainingData
from clipdistill.training.blocks import BlockLoss, BlockPair, LiveCells, StoredCells
from clipdistill.training.loop import distill

PAIRS = tuple(tiny.pairs(40))
BLOCKS = (
    BlockPair("image", "trunk.blocks.1", "early", 64, 6),
    BlockPair("image", "trunk.blocks.5", "late", 64, 64),
    BlockPair("text", "transformer.resblocks.0", "words", 16, 6),
)
WIDTHS = {pair.teacher: pair.teacher_width for pair in BLOCKS}


def cells(name, block, count):
    """What a pretended teacher's block gives for a name: a function of both alone."""
    seed = int.from_bytes(name.encode()[-6:], "little") + len(block)
    return np.random.default_rng(seed).standard_normal((count, WIDTHS[block])).astype(np.float16)


class Stored:
    """Facts as the store of blocks gives them."""

    def of_images(self, keys, views):
        names = [f"{key}#{view}" for key, view in zip(keys, views, strict=True)]
        return {fact_name("image", b): np.stack([cells(n, b, 4) for n in names]) for b in ("early", "late")}

    def of_texts(self, texts):
        return {fact_name("text", "words"): np.stack([cells(text, "words", 2) for text in texts])}


def loss(student, teacher=None, blocks=BLOCKS, **changes):
    values = {"weight": 2.0, "form": "cosine", "cells": 2, "seed": 3}
    return BlockLoss(student, blocks, teacher or StoredCells(), **(values | changes))


def run(student, extra, *, folder=None, on_log=None, **train):
    values = {"batch": 6, "steps": 6, "batch_texts": 70}
    return distill(
        student,
        little.Teacher(PAIRS),
        TrainingData(PAIRS, (), (), tuple(little.TEXTS[80:100])),
        objective=little.objective(feature_cosine=1.0),
        train=little.settings(**(values | train)),
        seed=5,
        folder=folder,
        on_log=on_log,
        on_eval=lambda student, step: {"score": float(student.encode_texts(["a cat"])[0, 0])},
        extras=[extra],
        facts=[Stored()],
    )


def test_the_first_terms_are_those_of_a_slow_reading_row_by_row():
    student, seen = little.student("test_vit", drop=0.0), []
    extra = loss(student)
    maps = {name: (value.weight.clone(), value.bias.clone()) for name, value in extra.learned.items()}
    batches, terms = [], extra.terms

    def noting(model, batch, embedded):
        batches.append(batch)
        return terms(model, batch, embedded)

    extra.terms = noting
    probe = little.student("test_vit")
    run(student, extra, on_log=seen.append, steps=1, warmup=0)
    (batch,), first = batches, seen[0]
    assert len(batch.tokens) == 76  # texts are run in groups of like length
    image = [
        slow(probe, "image", block, batch.pixels, batch.keys, maps[f"image_{number}"])
        for number, block in enumerate(BLOCKS[:2])
    ]
    assert first["blocks_image"] == pytest.approx(np.mean(image), abs=2e-4)
    text = slow(probe, "text", BLOCKS[2], batch.tokens, batch.texts, maps["text_0"])
    assert first["blocks_text"] == pytest.approx(text, abs=2e-4)
    parts = first["feature_image"] + first["feature_text"] + 2 * (first["blocks_image"] + first["blocks_text"])
    assert first["loss"] == pytest.approx(parts, abs=1e-4)


def slow(student, side, block, inputs, names, linear):
    """1 - cos of one block, by running each row on its own and pooling it by hand."""
    tower = student.model.visual if side == "image" else student.model.text
    held, apart = {}, []
    tower.get_submodule(block.student).register_forward_hook(lambda *seen: held.update(out=seen[2].detach()[0]))
    student.module.train()
    for row, name in enumerate(names):
        if side == "image":
            student.embed_pixels(inputs[row : row + 1])
            grid = held["out"][1:].reshape(2, 2, -1).flatten(0, 1)
            own, theirs = grid, cells(f"{name}#0", block.teacher, 4)
        else:
            length = int(inputs[row].argmax()) + 1
            student.embed_tokens(inputs[row : row + 1])
            words = held["out"][1:length]
            half, other = -(-len(words) // 2), len(words) // 2
            own = torch.stack([words[:half].mean(dim=0), words[other:].mean(dim=0)])
            theirs = cells(name, block.teacher, 2)
        mapped = F.linear(own, *linear).detach()
        apart.append(1 - F.cosine_similarity(mapped, torch.tensor(theirs).float(), dim=-1))
    return float(torch.stack(apart).mean())


def test_equal_widths_start_at_the_identity_and_the_seed_decides_the_others():
    student = little.student("test_vit")
    one, other, third = loss(student), loss(student), loss(student, seed=4)
    assert torch.equal(one.learned["image_1"].weight, torch.eye(64))
    assert not one.learned["image_1"].bias.any()
    bits = [fingerprint.of_tensors(extra.learned.state_dict()) for extra in (one, other, third)]
    assert bits[0] == bits[1] != bits[2]


@pytest.mark.parametrize("form", ["cosine", "mse"])
def test_blocks_are_learned_with_the_maps(form):
    student, lines = little.student("test_vit"), []
    extra = loss(student, form=form)
    before = fingerprint.of_tensors(extra.learned.state_dict())
    run(student, extra, on_log=lines.append, steps=25, lr=5e-3, batch_texts=6)
    told = [line for line in lines if "loss" in line]
    for name in ("blocks_image", "blocks_text"):
        assert told[-1][name] < 0.95 * told[0][name]
    assert fingerprint.of_tensors(extra.learned.state_dict()) != before


def test_a_cut_training_goes_on_with_the_same_bits(tmp_path):
    def begun():
        student = little.student("test_vit", drop=0.1)
        return student, loss(student)

    def dying(line):
        if line.get("step") == 5:
            raise KeyboardInterrupt

    settings = {"accumulation": 2, "ema": 0.9}
    whole, extra = begun()
    run(whole, extra, folder=tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(*begun(), folder=tmp_path / "cut", on_log=dying, **settings)
    again, other = begun()
    run(again, other, folder=tmp_path / "cut", **settings)
    assert fingerprint.of_tensors(again.module.state_dict()) == fingerprint.of_tensors(whole.module.state_dict())
    assert fingerprint.of_tensors(other.learned.state_dict()) == fingerprint.of_tensors(extra.learned.state_dict())
    third, narrow = little.student("test_vit", drop=0.1), None
    narrow = loss(third, blocks=BLOCKS[:1])
    with pytest.raises(MismatchError, match="objective"):
        run(third, narrow, folder=tmp_path / "cut", **settings)


def test_a_side_without_rows_has_no_term():
    student, lines = little.student("test_vit"), []
    run(student, loss(student), on_log=lines.append, batch=0, batch_texts=8, steps=2)
    told = [line for line in lines if "loss" in line]
    assert all("blocks_image" not in line and "blocks_text" in line for line in told)


def test_other_passes_through_the_tower_are_told_apart():
    student = little.student("test_vit")
    extra = loss(student, blocks=BLOCKS[:1])
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = batch_of(pixels)
    with extra.watching(student):
        embedded = Embeddings(student.embed_pixels(pixels), torch.zeros(0, 16))
        (plain,) = extra.terms(student, batch, embedded)
        student.embed_pixels(torch.zeros_like(pixels))  # masked pictures, say
        student.embed_pixels(pixels)
        student.embed_pixels(torch.zeros_like(pixels))
        (found,) = extra.terms(student, batch, embedded)
        assert found.value.item() == plain.value.item()
        student.embed_pixels(torch.zeros_like(pixels))
        student.embed_pixels(torch.ones_like(pixels))
        with pytest.raises(MismatchError, match="passes over the batch"):
            list(extra.terms(student, batch, embedded))


def batch_of(pixels):
    from clipdistill.training.batch import Batch

    none = torch.zeros(0, little.TEACHER_DIM)
    keys = tuple(pair.key for pair in PAIRS[: len(pixels)])
    facts = {name: torch.tensor(value) for name, value in Stored().of_images(keys, [0] * len(keys)).items()}
    tokens = torch.zeros(0, 1, dtype=torch.int64)
    return Batch(0, pixels, tokens, none, none, torch.zeros(0, 0).bool(), 0, keys, (), (), facts)


def test_a_live_teachers_last_pass_is_the_batchs():
    class Taps:
        def take(self):
            from clipdistill.towers.tap import Pass

            return [Pass(torch.zeros(1), {"early": torch.zeros(1)}), Pass(torch.zeros(1), {"early": torch.ones(1)})]

    found = LiveCells({"image": Taps()}).cells("image", batch_of(torch.zeros(2, 3, 32, 32)))
    assert found["early"].item() == 1
