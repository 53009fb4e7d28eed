"""Students as transformers' CLIPModel: equal rows whatever the tower has, and one sentence for what it cannot be."""

import io
import json
import logging

import pytest
import tiny
import torch
from formats import vits
from PIL import Image
from safetensors.torch import load_file
from training import little

from clipdistill.core.errors import MissingExtraError, ParityError
from clipdistill.formats import layouts, parity
from clipdistill.formats.clip_model import clip_model_faults, write_clip_model
from clipdistill.formats.probe import Probe, expected_rows, read_check, write_check
from clipdistill.towers.preprocess import Preprocess

PICTURES = [pair.picture for pair in tiny.pairs(6)]
HARD = ["", "A Red  bicycle &amp; “quotes” <|endoftext|> x", "<|pad|> y", "ﬁ ＡＢ é 漢字 😀\0", " ".join(["cat"] * 40)]


def load(folder):
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"quick_gelu": True, "vision": {"ls_init_value": 0.3, "mlp_ratio": 2.0}, "text": {"ls_init_value": 0.2}},
        {
            "vision": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-2}},
            "text": {"norm_kwargs": {"eps": 1e-3}, "pool_type": "eos"},
        },
        {"vision": {"patch_dropout": 0.5, "final_ln_after_pool": True}, "init_logit_bias": -10.0},
    ],
    ids=["plain", "layer scale, quick gelu", "tanh, epsilons, eos", "dropout, bias"],
)
def test_clip_model_embeds_as_the_student_does(tmp_path, made, caplog):
    student = vits.vit(**made)
    if made.get("text", {}).get("pool_type") == "eos":
        student.model.text.eos_id = student.tokenizer.end_id
    assert list(clip_model_faults(student)) == []
    student.tokenizer.save(tmp_path)
    with caplog.at_level(logging.WARNING, "clipdistill"):
        write_clip_model(student, tmp_path, ())
    assert ("no logit bias" in caplog.text) == ("init_logit_bias" in made)
    model, processor = load(tmp_path)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    tokens = processor.tokenizer(HARD, padding=True, truncation=True, return_tensors="pt")
    assert (tokens["input_ids"].numpy() == student.tokenizer.encode(HARD)).all()
    pixels = torch.from_numpy(student.preprocess.read(PICTURES, student.max_pixels))
    with torch.inference_mode():
        texts = model.get_text_features(**tokens).pooler_output
        images = model.get_image_features(pixel_values=pixels).pooler_output
        logits = model(**tokens, pixel_values=pixels).logits_per_image
    assert vits.cosine(texts, student.encode_texts(HARD)) > 0.999999
    assert vits.cosine(images, student.encode_images(PICTURES)) > 0.999999
    cosines = student.encode_images(PICTURES) @ student.encode_texts(HARD).T
    scale = student.model.logit_scale.exp().item()
    torch.testing.assert_close(logits, torch.from_numpy(scale * cosines), rtol=1e-4, atol=1e-4 * scale)


def test_the_configuration_names_the_students_own_special_tokens(tmp_path):
    student = vits.vit()
    write_clip_model(student, tmp_path, ())
    config = json.loads((tmp_path / "config.json").read_text())
    last = student.tokenizer.vocab_size - 1
    for part in (config, config["text_config"]):
        assert (part["pad_token_id"], part["bos_token_id"], part["eos_token_id"]) == (0, last - 1, last)
    assert config["text_config"]["hidden_size"] != config["vision_config"]["hidden_size"]


@pytest.mark.parametrize(
    ("student", "part"),
    [
        (lambda: little.student("test_efficientnet"), "its picture tower is one of timm's networks"),
        (lambda: little.student("test_vit"), "its picture tower is one of timm's networks"),
        (lambda: vits.vit(vision={"layers": [1, 1, 1, 1], "width": 16}), "is a ModifiedResNet"),
        (lambda: vits.vit(vision={"no_ln_pre": True}), "does not normalise the patches"),
        (lambda: vits.vit(vision={"pool_type": "avg"}), "pooled by 'avg'"),
        (lambda: vits.vit(vision={"attentional_pool": True, "attn_pooler_heads": 2}), "an attention pooler"),
        (lambda: vits.vit(vision={"block_type": "custom", "qk_norm": True}), "picture tower's blocks are not CLIP's"),
        (lambda: vits.vit(text={"block_type": "custom", "scale_fc": True}), "text tower's blocks are not CLIP's"),
        (lambda: vits.vit(text={"no_causal_mask": True, "pool_type": "last"}), "(pool_type 'last')"),
        (lambda: vits.vit(text={"proj_bias": True}), "projection has a bias"),
        (lambda: vits.vit(preprocess=Preprocess((32, 32), resize_mode="longest")), "resize_mode longest"),
        (lambda: vits.vit(vision={"image_size": [32, 48]}, preprocess=Preprocess((32, 48))), "32 x 48 px"),
    ],
)
def test_what_clip_model_cannot_be_is_one_sentence(student, part):
    faults = list(clip_model_faults(student()))
    assert sum(part in fault for fault in faults) in (1, 2), faults  # what is not square is so twice
    assert all(fault.startswith("export.layouts: clip_model: ") and "leave clip_model out" in fault for fault in faults)


def test_its_reader_tells_other_tokens_from_the_students(tmp_path):
    student = vits.vit()
    probe = Probe.of(student, HARD, PICTURES)
    (reading,) = layouts.LAYOUTS["clip_model"].readings(("fp32",))
    theirs = {"input_ids": student.tokenizer.encode(HARD).astype("float32")}
    parity._check_tokens(reading, probe, theirs)
    theirs["input_ids"][1, 2] += 1
    with pytest.raises(ParityError, match=r"for 1 of 5 texts, first for 'A Red  bicycle"):
        parity._check_tokens(reading, probe, theirs)
    with pytest.raises(ParityError, match="for 5 of 5 texts"):
        parity._check_tokens(reading, probe, {"input_ids": theirs["input_ids"][:, 1:]})


def test_the_texts_and_small_pictures_travel_whole(tmp_path):
    student = vits.vit()
    probe = Probe.of(student, [*HARD, "lone \ud800"], PICTURES)
    assert probe.texts == (*HARD, "lone \ufffd")
    for row, pixels in probe.originals.items():
        decoded = Image.open(io.BytesIO(PICTURES[row].read())).convert("RGB")
        assert (pixels == decoded).all()
    write_check(student, probe, tmp_path / "check.npz")
    again, rows = read_check(tmp_path / "check.npz", student.preprocess)
    assert again.texts == probe.texts
    assert vits.cosine(rows["text"], expected_rows(student, probe)["text"]) > 0.999999


def test_a_library_older_than_the_layout_is_named_with_both_versions(monkeypatch):
    import importlib.metadata

    for found, refused in (("4.57.1", True), ("5.0.0.dev0", False), ("5.23.0", False), ("10.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=found: found)
        if not refused:
            layouts.check_packages(["clip_model"])
            continue
        with pytest.raises(MissingExtraError, match=r"transformers 4\.57\.1 is installed, and 5 or newer") as caught:
            layouts.check_packages(["clip_model"])
        assert "--upgrade 'clipdistill[export]'" in str(caught.value)
