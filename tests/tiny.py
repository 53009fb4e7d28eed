"""Tiny real things for tests: an open_clip teacher folder with random weights, pictures, and a run's configuration."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from clipdistill.data.records import Pair, Picture

PREPROCESS = {
    "size": 32,
    "mode": "RGB",
    "mean": [0.48, 0.45, 0.4],
    "std": [0.26, 0.26, 0.27],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def model_cfg(*, siglip: bool = False, custom: bool = True, dim: int = 24) -> dict[str, object]:
    text: dict[str, object] = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    cfg: dict[str, object] = {
        "embed_dim": dim,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": text,
    }
    if custom or siglip:
        cfg["custom_text"] = True
    if siglip:
        cfg |= {"init_logit_scale": 2.3, "init_logit_bias": -10.0}
        text |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    return cfg


def teacher_folder(folder: Path, *, seed: int = 0, siglip: bool = False, custom: bool = True, dim: int = 24) -> Path:
    """An open_clip ``local-dir:`` folder with random weights; the logit scale is 1/0.07."""
    folder.mkdir(parents=True)
    cfg = model_cfg(siglip=siglip, custom=custom, dim=dim)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = open_clip.model.CustomTextCLIP if cfg.get("custom_text") else open_clip.model.CLIP
        model = kind(**{key: value for key, value in cfg.items() if key != "custom_text"})
    weights = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": PREPROCESS}))
    return folder


def image_bytes(number: int, size: tuple[int, int] = (40, 36), form: str = "PNG") -> bytes:
    """A picture that is different for every number."""
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(out, form)
    return out.getvalue()


WORDS = ("red", "blue", "green", "small", "large", "old", "new", "round", "flat", "warm")
THINGS = ("bicycle", "cat", "house", "tree", "boat", "lamp", "shoe")


def caption(number: int) -> str:
    """A caption that is different for every number below 70."""
    return f"a {WORDS[number % len(WORDS)]} {THINGS[number // len(WORDS) % len(THINGS)]}"


def pairs(count: int, start: int = 0) -> list[Pair]:
    return [
        Pair(
            f"row/{number:03d}",
            Picture(f"memory[{number}]", data=image_bytes(number)),
            (caption(number), f"{caption(number)} in a picture"),
        )
        for number in range(start, start + count)
    ]


def image_folder(folder: Path, count: int, start: int = 0) -> Path:
    """A folder of pictures with same-stem captions."""
    folder.mkdir(parents=True)
    for number in range(start, start + count):
        (folder / f"p{number:03d}.png").write_bytes(image_bytes(number))
        (folder / f"p{number:03d}.txt").write_text(caption(number), encoding="utf-8")
    return folder


def run_toml(folder: Path, **changes: str) -> Path:
    """A complete small run: teacher, data and configuration below ``folder``."""
    teacher_folder(folder / "teacher")
    for name, count, start in (("train", 24, 0), ("val", 8, 24), ("test", 10, 32)):
        image_folder(folder / name, count, start)
    path = folder / "run.toml"
    path.write_text(
        """name = "small"
seed = 3
[data]
train = "train"
val = "val"
test = "test"
[teacher]
model = "local-dir:teacher"
batch = 8
[cache]
shard_rows = 16
[student]
image = "mobilenetv4_conv_small_050"
image_size = 32
image_init = "random"
text = "nano"
[train]
steps = 4
batch = 8
warmup = 1
eval_every = 2
save_every = 2
log_every = 1
""",
        encoding="utf-8",
    )
    return path


COLOURS = {"red_thing": (200, 30, 30), "blue_thing": (30, 30, 200), "green_thing": (30, 180, 30)}


def class_folder(folder: Path, count: int, start: int = 0, colours: dict[str, tuple[int, int, int]] = COLOURS) -> Path:
    """A folder of classes, each with so many pictures of nearly one colour."""
    for place, (name, colour) in enumerate(colours.items()):
        (folder / name).mkdir(parents=True)
        for number in range(start, start + count):
            rng = np.random.default_rng([place, number])
            pixels = np.clip(np.array(colour) + rng.integers(-30, 30, (6, 6, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((40, 36), Image.Resampling.NEAREST).save(
                folder / name / f"p{number:03d}.png"
            )
    return folder


def class_toml(folder: Path, sections: str = "", train: str = "") -> Path:
    """A complete small classification: teacher, folders of classes and configuration below ``folder``."""
    teacher_folder(folder / "teacher")
    for name, count, start in (("train", 8, 0), ("val", 3, 8), ("test", 4, 11)):
        class_folder(folder / name, count, start)
    path = folder / "run.toml"
    path.write_text(
        f"""name = "classes"
seed = 3
[data]
train = "train"
val = "val"
test = "test"
[task]
kind = "classification"
templates = ["a photo of a {{}}.", "{{}}"]
[teacher]
model = "local-dir:teacher"
batch = 8
[cache]
shard_rows = 16
[student]
image = "mobilenetv4_conv_small_050"
image_size = 32
image_init = "random"
text = "nano"
[train]
steps = 4
warmup = 1
eval_every = 2
save_every = 2
log_every = 1
device = "cpu"
threads = 1
{train or "batch = 8"}
{sections}
""",
        encoding="utf-8",
    )
    return path
