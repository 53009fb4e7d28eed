"""A real student and a pretended teacher, both small: the training tests' common ground."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import tiny

from clipdistill.config import TrainConfig
from clipdistill.core import fingerprint
from clipdistill.data.records import Pair, Picture
from clipdistill.data.views import View, view
from clipdistill.losses.objective import LossWeights, Objective, TeacherScale
from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.student import DualEncoder, assemble, projections
from clipdistill.towers.tokenizer import StudentTokenizer, default_backend
from clipdistill.towers.vocabulary import prune

TEACHER_DIM = 24
TEXTS = [caption for pair in tiny.pairs(70) for caption in pair.captions]


def tokenizer() -> StudentTokenizer:
    return StudentTokenizer(prune(default_backend(), TEXTS).backend, 16)


def student(tower: str = "test_efficientnet", *, dim: int = 16, drop: float = 0.0, seed: int = 0) -> DualEncoder:
    """One text layer, and a picture tower of timm's test models: with batch norms, or ``test_vit`` without."""
    words = tokenizer()
    vision = {"timm_model_name": tower, "timm_model_pretrained": False, "image_size": 32, "timm_proj": "linear"}
    vision |= {"timm_pool": "avg" if "vit" in tower else "", "timm_drop": drop}
    text = {"context_length": 16, "vocab_size": words.vocab_size, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": dim, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    projection = None if dim == TEACHER_DIM else projections(dim, TEACHER_DIM, seed)
    return DualEncoder(assemble(cfg, seed), cfg, words, Preprocess(size=(32, 32)), projection=projection)


class Teacher:
    """Rows that are a function of the key or text alone; satisfies the loop's TeacherRows."""

    dim = TEACHER_DIM
    scale = 50.0
    bias: float | None = None

    def __init__(self, pairs: Sequence[Pair] = (), views: int = 1) -> None:
        self.views = views
        self.marks = {pair.key: fingerprint.of_bytes(pair.picture.read()) for pair in pairs if pair.picture}

    def image_rows(self, keys: Sequence[str], views: Sequence[int]) -> np.ndarray:
        return np.stack([self.row(f"{key}#{number}") for key, number in zip(keys, views, strict=True)])

    def text_rows(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.row(text) for text in texts])

    def view(self, key: str, number: int) -> View:
        return view(0, key, number)

    def mark(self, key: str) -> str | None:
        return self.marks.get(key)

    def row(self, name: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        row = np.random.default_rng(seed).standard_normal(self.dim)
        return (row / np.linalg.norm(row)).astype(np.float32)


def objective(**weights: object) -> Objective:
    chosen = weights or {"clip": 1.0, "affinity": 1.0, "feature_cosine": 8.0, "interactive": 1.0}
    teacher = TeacherScale(Teacher.scale, Teacher.bias)
    return Objective(LossWeights(**chosen), teacher, dim=16, teacher_dim=TEACHER_DIM)


def settings(**changes: object) -> TrainConfig:
    values = {"steps": 8, "batch": 6, "warmup": 2, "log_every": 1, "eval_every": 3, "save_every": 2, "lr": 2e-3}
    return TrainConfig(**(values | {"device": "cpu", "threads": 1} | changes))


def broken(key: str) -> Pair:
    return Pair(key, Picture(f"broken {key}", data=b"\x89PNG\r\n\x1a\n but no more"), (f"caption of {key}",))
