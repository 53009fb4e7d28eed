"""Small real teachers that differ from the little student in resolution, tokenizer, and kind of logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import tiny
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from training import little
from transformers import PreTrainedTokenizerFast

from clipdistill.cache import TeacherCache, fill
from clipdistill.cache.store import Views
from clipdistill.data.records import Pair
from clipdistill.losses.objective import LossWeights, Objective, TeacherScale
from clipdistill.towers.live import LiveTeacher
from clipdistill.towers.teacher import Teacher, load_teacher
from clipdistill.training.live import Live

SIZE = 48
"""The teachers' resolution; the little student's is 32."""


def load(folder: Path, kind: str) -> Teacher:
    """A ``clip`` teacher with CLIP's tokenizer, or a ``siglip`` one with a bias, a bidirectional text tower and an own
    word tokenizer; both take pictures of another size than the student, squashed where it crops."""
    folder.mkdir(parents=True)
    cfg = tiny.model_cfg(siglip=kind == "siglip", dim=little.TEACHER_DIM)
    cfg["vision_cfg"]["image_size"] = SIZE
    if kind == "siglip":
        cfg["text_cfg"] |= {"hf_tokenizer_name": "in-this-folder", "context_length": 9, "vocab_size": words(folder)}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = open_clip.model.CustomTextCLIP(**{key: value for key, value in cfg.items() if key != "custom_text"})
    weights = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = tiny.PREPROCESS | {"size": SIZE, "resize_mode": "squash", "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
    return load_teacher(f"local-dir:{folder}")


def words(folder: Path) -> int:
    """Write a tokenizer whose tokens are whole words; returns how many there are."""
    known = sorted({word for text in little.TEXTS for word in text.split()})
    vocabulary = {"<pad>": 0, "<unk>": 1} | {word: number for number, word in enumerate(known, 2)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return len(vocabulary)


def live(teacher: Teacher, views: int = 1) -> Live:
    return Live(LiveTeacher(teacher), Views(views, 3))


def cached(folder: Path, teacher: Teacher, pairs: tuple[Pair, ...], dtype: str = "float32") -> TeacherCache:
    return fill(folder, teacher, pairs, dtype=dtype)


def objective(teacher: Teacher, **weights: float) -> Objective:
    chosen = weights or {"clip": 1.0, "affinity": 1.0, "feature_cosine": 8.0, "interactive": 1.0, "siglip": 0.5}
    return Objective(LossWeights(**chosen), TeacherScale(teacher.scale, teacher.bias))


class NoRows(little.Teacher):
    """A cache that holds no row of what is trained on."""

    def image_rows(self, keys, views) -> np.ndarray:
        raise AssertionError("a stored picture was asked for")

    def text_rows(self, texts) -> np.ndarray:
        raise AssertionError("a stored text was asked for")
