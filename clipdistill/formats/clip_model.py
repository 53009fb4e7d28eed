"""The layout ``clip_model``: what ``transformers.CLIPModel`` loads, its processor included."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipdistill.formats import clip_towers
from clipdistill.formats.hub_files import (
    CONFIG,
    PREPROCESSOR,
    processor_faults,
    special_ids,
    write_config,
    write_processor,
)
from clipdistill.towers.student import DualEncoder

WEIGHTS = "model.safetensors"
FILES = (CONFIG, WEIGHTS, PREPROCESSOR)
_log = logging.getLogger("clipdistill")
_MODEL = "export.layouts: clip_model: CLIPModel cannot be this student"


def clip_model_faults(student: DualEncoder) -> Iterator[str]:
    """Why CLIPModel could not be a student, one sentence each."""
    if student.preprocess is None:
        yield f"{_MODEL}: it has a text tower alone: leave clip_model out, and use onnx or sentence_transformers"
        return
    for gap in clip_gaps(student):
        yield f"{_MODEL}: {gap}: leave clip_model out, and use onnx or sentence_transformers"
    yield from processor_faults(student.preprocess, "clip_model")


def clip_gaps(student: DualEncoder) -> Iterator[str]:
    """What a student with both towers has that CLIP has not, one phrase each."""
    yield from clip_towers.image_gaps(student.model.visual)
    yield from clip_towers.text_gaps(student.model.text)


def write_clip_model(student: DualEncoder, folder: Path, precisions: Sequence[str]) -> None:
    """Write a student's towers as a CLIPModel, in float32, with the configuration of its processor.

    A logit bias, which only SigLIP's objective trains, has no place in CLIPModel: its logits are without it. No
    embedding and no ranking depends on it.

    Args:
        student: A student without :func:`clip_model_faults`.
        folder: The export, aside, with the tokenizer's files.
        precisions: Of the other layouts; this one has its weights as they were trained.
    """
    if student.preprocess is None:
        raise ValueError("CLIPModel needs both towers")
    visual, text = student.model.visual, student.model.text
    weights = {f"vision_model.{name}": value for name, value in clip_towers.image_weights(visual).items()}
    weights |= {f"text_model.{name}": value for name, value in clip_towers.text_weights(text).items()}
    weights |= {
        "visual_projection.weight": clip_towers.image_projection(visual),
        "text_projection.weight": clip_towers.text_projection(text),
        "logit_scale": student.model.logit_scale.detach().cpu().float().clone(),
    }
    if student.model.logit_bias is not None:
        bias = student.model.logit_bias.item()
        _log.warning("clip_model: CLIPModel has no logit bias, and this student's is %.4g: its logits lack it", bias)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    write_config(folder, _config(student))
    write_processor(folder, student.preprocess)


def _config(student: DualEncoder) -> dict[str, Any]:
    ids, dim = special_ids(student.tokenizer), student.dim
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "torch_dtype": "float32",  # what transformers 4 and transformers.js call it
        "projection_dim": dim,
        "logit_scale_init_value": student.model.logit_scale.item(),
        **ids,
        "text_config": {
            "model_type": "clip_text_model",
            **clip_towers.text_config(student.model.text),
            "projection_dim": dim,
            **ids,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **clip_towers.image_config(student.model.visual),
            "projection_dim": dim,
        },
    }
