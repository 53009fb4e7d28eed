"""What a student is to be made of: the towers found, how the teacher's own are cut, and what does not go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from open_clip.transformer import QuickGELU

from clipdistill.config import InheritConfig
from clipdistill.core.errors import ConfigError
from clipdistill.towers import weights
from clipdistill.towers.blueprint import INHERIT, ImageTower, TextTower, image_tower
from clipdistill.towers.inherit import teacher_token_table
from clipdistill.towers.inheritance.convolutional import pruning_faults, torch_pruning
from clipdistill.towers.inheritance.plan import Calibration, Cut, plan_cut
from clipdistill.towers.inheritance.tower import Side
from clipdistill.towers.inheritance.trunk import Trunk, plan_trunk

CUT = "cut"
"""Where the weights of an inherited tower come from."""


class TeacherParts(Protocol):
    """What a student may begin from: its teacher's model and tokenizer."""

    model: Any
    tokenizer: Any


class Cuts(TypedDict, total=False):
    """How the towers that are the teacher's own are cut."""

    image: Cut | Trunk
    text: Cut


@dataclass(frozen=True)
class Choice:
    """What was chosen, with the towers found; no picture tower where pictures stay the teacher's."""

    image: ImageTower | None
    text: TextTower
    image_init: str
    text_init: str
    pretrained: str | None
    image_weights: Path | None
    teacher: TeacherParts | None
    cuts: Cuts


def plan_cuts(
    image: str,
    text: str,
    teacher: TeacherParts | None,
    rule: InheritConfig,
    calibration: Calibration | None,
    seed: int,
) -> Cuts:
    """How the towers that are the teacher's own are cut, by side.

    Raises:
        ConfigError: If there is no teacher to cut, or it cannot be cut.
    """
    named: list[tuple[Side, str]] = [("image", image), ("text", text)]
    sides = [side for side, name in named if name == INHERIT]
    if sides and teacher is None:
        raise ConfigError(
            f'student.{sides[0]}: "inherit" cuts the tower out of one live teacher (teacher.model), and there is none '
            "here; name a tower instead"
        )
    rows = calibration or Calibration(torch.zeros(0, 3, 1, 1), torch.zeros(0, 1, dtype=torch.long))
    model = None if teacher is None else teacher.model
    found: Cuts = {}
    if "image" in sides:
        found["image"] = inherited_image(model, rule, rows, seed)
    if "text" in sides:
        found["text"] = inherited_text(model, rule, rows, seed)
    return found


def inherited_image(model: Any, rule: InheritConfig, rows: Calibration, seed: int) -> Cut | Trunk:
    """How a teacher's picture tower is cut, by its kind.

    Raises:
        ConfigError: If there is no way for its kind, or the shares do not go together.
    """
    return plan_trunk(model.visual, rule) or plan_cut(model, "image", rule, rows, seed=seed)


def inherited_text(model: Any, rule: InheritConfig, rows: Calibration, seed: int) -> Cut:
    """How a teacher's text tower is cut.

    Raises:
        ConfigError: If there is no way for its kind, or the shares do not go together.
    """
    return plan_cut(model, "text", rule, rows, seed=seed)


def kept_share(cuts: Cuts, share: float | None) -> float:
    """The share of its channels that the picture tower keeps: of a teacher's own CNN, or of a named one."""
    cut = cuts.get("image")
    if isinstance(cut, Trunk):
        return cut.share
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"student.prune: must be a share above 0 and up to 1, got {share}")
    return 1.0 if share is None else share


def prune_faults(image: str) -> Iterator[str]:
    """Why a named picture tower cannot be pruned, found without its weights: one sentence a fault.

    Args:
        image: The picture tower's name, as in ``student.image``; a known one.

    Raises:
        MissingExtraError: If torch-pruning is not installed.
    """
    import timm

    name = image_tower(image).timm_name
    reasons = ["it is not a convolutional network of timm"]
    if name is not None:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            reasons = list(pruning_faults(timm.create_model(name)))
    if reasons:
        yield f"student.prune: {image} cannot be pruned: {'; '.join(reasons)}; leave it out, or name a CNN of timm"
    torch_pruning()


def choice_faults(plan: Choice) -> Iterator[str]:
    """What does not go together, one sentence a fault."""
    text = plan.text
    if plan.text_init == "inherit" and (plan.teacher is None or teacher_token_table(plan.teacher.model) is None):
        yield (
            'student.text_init: "inherit" takes the token table from a teacher\'s text tower, and there is none here '
            '(embeddings only, or no table); set student.text_init = "random" or "pretrained"'
        )
    if plan.text_init == "pretrained" and not text.loadable:
        yield (
            f'student.text_init: "pretrained" needs an open_clip configuration with CLIP\'s own text tower and '
            f'tokenizer, such as ViT-B-32; {text.name} is not one: set student.text_init = "inherit" or "random"'
        )
    if plan.text_init == "pretrained" and plan.pretrained is None:
        yield f"student.pretrained: missing: the text tower of {text.name} needs an open_clip tag or a file"
    if plan.image is not None:
        yield from _picture_faults(plan, plan.image)
    elif plan.pretrained is not None and plan.text_init != "pretrained":
        yield (
            f"student.pretrained: {plan.pretrained!r} is for a pretrained text tower, which {text.name} is not here; "
            'leave it out, or set student.text_init = "pretrained"'
        )


def _picture_faults(plan: Choice, image: ImageTower) -> Iterator[str]:
    text = plan.text
    asks = (plan.image_init == "pretrained" and image.open_clip_name) or plan.text_init == "pretrained"
    if plan.pretrained is not None and not asks:
        yield (
            f"student.pretrained: {plan.pretrained!r} is for open_clip configurations with pretrained towers, which "
            f"neither {image.name} nor {text.name} is here; leave it out (timm towers take student.image_weights)"
        )
    if plan.image_init == "random" and plan.image_weights is not None:
        yield 'student.image_weights: given, but student.image_init is "random"; leave one of the two out'
    if plan.image_init == "pretrained" and plan.image_weights is None and not image.timm_name and not plan.pretrained:
        yield (
            f"student.pretrained: missing: {image.name} needs an open_clip tag or a file for its weights; valid: "
            f'{", ".join(weights.tags(image.name))}; or set student.image_init = "random"'
        )
    if len(set(quick_gelus(plan))) == 2:
        yield (
            f"student.text: the towers of {image.name} and {text.name} differ in QuickGELU, which open_clip "
            "sets for both at once; take both from one configuration"
        )


def quick_gelus(plan: Choice) -> list[bool]:
    """Which activation each pretrained tower asks for that minds; else the one of the picture tower's configuration."""
    image, text, wanted = plan.image, plan.text, _cut_quick_gelu(plan.cuts)
    if image is not None and image.quick_gelu is not None and plan.image_init == "pretrained":
        wanted.append(image.quick_gelu or weights.needs_quick_gelu(image.name, plan.pretrained))
    if plan.text_init == "pretrained":
        wanted.append(text.quick_gelu or weights.needs_quick_gelu(text.name, plan.pretrained))
    return wanted or [_teacher_quick_gelu(plan.teacher) if image is None else bool(image.quick_gelu)]


def _cut_quick_gelu(cuts: Cuts) -> list[bool]:
    """Which activation each transformer tower has that is cut out of the teacher's."""
    towers = [cuts.get("image"), cuts.get("text")]
    return [cut.source.quick_gelu for cut in towers if isinstance(cut, Cut)]


def _teacher_quick_gelu(teacher: TeacherParts | None) -> bool:
    """Whether the teacher's picture tower has QuickGELU, however it came by it: some tags ask for it, some names."""
    visual = getattr(getattr(teacher, "model", None), "visual", None)
    return visual is not None and any(isinstance(part, QuickGELU) for part in visual.modules())
