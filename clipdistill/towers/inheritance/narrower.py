"""A trained student cut again: what progressive inheritance does between its phases."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

from clipdistill.config import InheritConfig
from clipdistill.towers.inheritance.plan import Calibration, plan_cut
from clipdistill.towers.inheritance.shape import Shape
from clipdistill.towers.inheritance.tower import Side
from clipdistill.towers.pruned import reshape, shapes_of
from clipdistill.towers.student import DualEncoder, assemble


def narrower(
    student: DualEncoder, shapes: Mapping[Side, Shape], rule: InheritConfig, calibration: Calibration, seed: int = 0
) -> DualEncoder:
    """Cut a student to a smaller one with the same tokenizer, preprocessing and map to the teacher's space.

    Args:
        student: The student; it is not changed.
        shapes: The measures that the shares are of, such as the teacher's, for each tower that is cut; a tower that is
            not named stays as it is.
        rule: The shares that are kept, and by what.
        calibration: Rows as the student takes them.
        seed: Decides what is random in measuring.

    Returns:
        The smaller student in eval mode, on the CPU.

    Raises:
        ConfigError: If a tower cannot be cut, or the shares do not go together.
    """
    cuts = {
        side: plan_cut(student.model, side, rule, calibration, like=shape, seed=seed) for side, shape in shapes.items()
    }
    model_cfg = student.model_cfg
    if "image" in cuts:
        model_cfg["vision_cfg"] = cuts["image"].image_tower(None).vision_cfg
    if "text" in cuts:
        model_cfg["text_cfg"] |= cuts["text"].text_tower().text_cfg
    model: Any = assemble(model_cfg, seed)
    with torch.no_grad():
        for name, value in student.model.state_dict().items():
            if name.startswith("logit_"):
                getattr(model, name).copy_(value)
    _fill(model, student, cuts, seed)
    smaller = DualEncoder(
        model,
        model_cfg,
        student.tokenizer,
        student.preprocess,
        projection=None if student.projection is None else deepcopy(student.projection).cpu(),
        dims=student.dims,
        max_pixels=student.max_pixels,
        pruned=student.pruned,
    )
    smaller.module.eval()
    return smaller


def _fill(model: Any, student: DualEncoder, cuts: Mapping[Side, Any], seed: int) -> None:
    sides: tuple[Side, ...] = ("image", "text")
    for side in sides:
        name = "visual" if side == "image" else "text"
        tower = getattr(model, name)
        if side in cuts:
            cuts[side].fill(tower, range(student.tokenizer.vocab_size), None, seed)
        else:
            own = getattr(student.model, name)
            reshape(tower, shapes_of(own))  # a picture tower may be pruned
            tower.load_state_dict(own.state_dict())
