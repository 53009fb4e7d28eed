"""A teacher's picture tower with a student's text tower, as one open_clip model that any open_clip user loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from clipdistill.core import files, manifest
from clipdistill.core.errors import ConfigError
from clipdistill.towers.query import folded, with_pictures
from clipdistill.towers.student import CONFIG, WEIGHTS, DualEncoder, assemble

_KIND, _VERSION = "combined-student", 1
_TOLERANCE, _HALF_TOLERANCE = (
    1e-4,
    1e-2,
)  # of unit rows: the order of summation, and a teacher that ran in half precision


def teacher_model_cfg(model: str) -> dict[str, Any]:
    """open_clip's ``model_cfg`` of a teacher.

    Args:
        model: As in ``teacher.model``.

    Raises:
        ConfigError: If it lies in a repository of a hub, whose files are not asked for again.
    """
    import open_clip

    if model.startswith("local-dir:"):
        return dict(files.read_json(Path(model.removeprefix("local-dir:")) / CONFIG)["model_cfg"])
    if model.startswith("hf-hub:"):
        raise ConfigError(f"teacher.model: the configuration of {model} is not at hand: copy its files to a local-dir:")
    return dict(open_clip.get_model_config(model))


def save_combined(folder: str | Path, student: DualEncoder, teacher: Any, model_cfg: Mapping[str, Any]) -> None:
    """Write a student's text tower beside its teacher's picture tower, as an open_clip ``local-dir:`` folder.

    The whole model is built from its configuration, as open_clip will build it, and embeds a picture of noise before
    anything is written: only what it then embeds as the teacher does is kept.

    Args:
        folder: Takes the place of whatever is there, at once and only when all is written.
        student: A student without a picture tower.
        teacher: The teacher's open_clip model.
        model_cfg: Its ``model_cfg``.

    Raises:
        ConfigError: If open_clip cannot rebuild the picture tower beside this text tower, with the reason.
    """
    folder, visual = Path(folder), teacher.visual
    if "vision_cfg" not in model_cfg or "multimodal_cfg" in model_cfg:
        raise ConfigError("teacher.model: its picture tower does not stand alone, so it cannot be combined")
    cfg = with_pictures({**student.model_cfg, "embed_dim": student.teacher_dim}, model_cfg["vision_cfg"])
    weights = _combined_weights(student, visual)
    try:
        model: Any = assemble(cfg).eval()
        model.load_state_dict(weights)
    except (AssertionError, RuntimeError, TypeError, ValueError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise ConfigError(
            f"teacher.model: its picture tower cannot be rebuilt from its configuration: {reason}"
        ) from fault
    _refuse_difference(model.visual, visual, cfg["vision_cfg"].get("image_size", 224))
    with files.replaced_folder(folder) as aside:
        files.write_json(aside / CONFIG, {"model_cfg": cfg, "preprocess_cfg": dict(visual.preprocess_cfg)})
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        student.tokenizer.save(aside)
        searches = None if student.searches is None else asdict(student.searches)
        manifest.write(aside, _KIND, _VERSION, {"student": student.fingerprint, "teacher": searches})


def _combined_weights(student: DualEncoder, visual: torch.nn.Module) -> dict[str, Tensor]:
    projection = None if student.projection is None else student.projection.get_parameter("text.weight").detach()
    parts = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    parts |= folded(student.model.state_dict(), projection)
    return {
        name: (value.float() if value.is_floating_point() else value).detach().cpu().contiguous().clone()
        for name, value in parts.items()
    }


@torch.no_grad()
def _refuse_difference(rebuilt: Any, original: torch.nn.Module, size: Any) -> None:
    like = next(original.parameters())
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    mine, theirs = rebuilt(noise), original(noise.to(like))
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor) or mine.shape != theirs.shape:
        raise ConfigError("teacher.model: its picture tower gives more than an embedding, so it cannot be combined")
    rows = (F.normalize(part.float().cpu(), dim=-1) for part in (mine, theirs))
    difference = float(torch.subtract(*rows).abs().max())
    if not difference <= (_TOLERANCE if like.dtype == torch.float32 else _HALF_TOLERANCE):
        raise ConfigError(
            f"teacher.model: rebuilt beside this text tower its picture tower embeds otherwise (by {difference:.2g}): "
            "the two ask for different activations, which open_clip sets for both at once"
        )
