"""A teacher written as an open_clip folder, after mutual training changed its weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipdistill.core import files, manifest
from clipdistill.core.errors import ConfigError, MismatchError
from clipdistill.towers.teacher import Teacher, load_teacher, plain

KIND, VERSION = "mutual-teacher", 1
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_NAMED = ("hf_model_name", "hf_tokenizer_name")  # what open_clip reads from a folder, where the name is one
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.h5", "*.msgpack")


def save_teacher(teacher: Teacher, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write a teacher as a folder that open_clip loads as ``local-dir:FOLDER``, and prove it by loading it.

    Args:
        teacher: A teacher that was loaded by an open_clip name.
        folder: Takes the place of whatever is there, at once and only when all is written. A text tower from
            Hugging Face is configured by files in this folder and names it, so such a folder must not be moved.
        extra: Further values for the manifest.

    Raises:
        ConfigError: If the teacher was not loaded by a name, so that its configuration is not known.
        MismatchError: If the folder does not give the same teacher back.
    """
    import open_clip

    config = open_clip.get_model_config(teacher.source) if teacher.source else None
    if config is None:
        raise ConfigError(f"teacher {teacher.name}: it is no open_clip model by name, so it cannot be saved as one")
    folder = Path(folder).resolve()
    preprocess = plain(teacher.model.visual.preprocess_cfg)
    with files.replaced_folder(folder) as aside:
        _copy_tokenizer(teacher, aside)
        model_cfg = _at_home(config, folder) | ({"quick_gelu": True} if teacher.quick_gelu else {})
        files.write_json(aside / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess})
        weights = {
            name: value.detach().cpu().contiguous().clone() for name, value in teacher.model.state_dict().items()
        }
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        manifest.write(aside, KIND, VERSION, {"name": teacher.name, "parts": teacher.parts, "extra": dict(extra or {})})
    _prove(teacher, folder)


def load_saved(folder: str | Path, *, device: str = "auto", max_pixels: int = 100_000_000) -> Teacher:
    """Load what :func:`save_teacher` wrote, after comparing every file with the manifest's SHA-256.

    Raises:
        DataError: If it was never finished.
        MismatchError: If a file differs.
    """
    folder = Path(folder).resolve()
    remedy = "Train again with --force."
    manifest.verify_files(folder, manifest.read(folder, KIND, VERSION, remedy)["files"], remedy)
    return load_teacher(f"local-dir:{folder}", device=device, max_pixels=max_pixels)


def _copy_tokenizer(teacher: Teacher, aside: Path) -> None:
    """The tokenizer's files, and a Hugging Face text tower's configuration: copied where the teacher is a folder."""
    if teacher.source and teacher.source.startswith("local-dir:"):
        home = Path(teacher.source.removeprefix("local-dir:"))
        left = {path.name for pattern in _WEIGHT_FILES for path in home.glob(pattern)} | {CONFIG, manifest.NAME}
        for path in sorted(home.iterdir()):
            if path.is_file() and path.name not in left:
                shutil.copyfile(path, aside / path.name)
        return
    inner = getattr(teacher.tokenizer, "tokenizer", None)  # open_clip's HFTokenizer; its own has no files
    if inner is not None and hasattr(inner, "save_pretrained"):
        inner.save_pretrained(aside)


def _at_home(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The model's configuration, which names the new folder where it named the old one, and fetches no weights."""
    moved: dict[str, Any] = deepcopy(dict(config))
    for name in _NAMED:
        if Path(moved["text_cfg"].get(name) or "").is_absolute():
            moved["text_cfg"][name] = str(folder)
    if "timm_model_name" in moved["vision_cfg"]:
        moved["vision_cfg"]["timm_model_pretrained"] = False
    return moved


def _prove(teacher: Teacher, folder: Path) -> None:
    found, remedy = load_teacher(f"local-dir:{folder}", device="cpu").parts, "Report it: open_clip reads it otherwise."
    for part, value in teacher.parts.items():
        if found[part] != value:
            raise MismatchError(str(folder), f"teacher.{part}", value, found[part], remedy)
