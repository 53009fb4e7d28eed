"""A teacher's convolutional picture tower as the student's: copied whole, and pruned once the student stands."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from clipdistill.config import InheritConfig
from clipdistill.core.errors import ConfigError
from clipdistill.towers.blueprint import INHERIT, ImageTower, Json
from clipdistill.towers.inheritance.convolutional import pruning_faults


@dataclass(frozen=True)
class Trunk:
    """A timm network inside an open_clip teacher, that is to be copied.

    Attributes:
        source: The teacher's ``visual``.
        share: The share of its channels that is to be kept afterwards.
    """

    source: Any
    share: float

    def image_tower(self, size: int | None) -> ImageTower:
        """The whole picture tower as a part of a ``model_cfg``; ``size`` is the side in pixels, None the source's."""
        height, width = (int(side) for side in self.source.image_size)
        name = self.source.trunk.default_cfg["architecture"]
        config: Json = {
            "timm_model_name": name,
            "timm_model_pretrained": False,
            "timm_pool": _pool(self.source.trunk),
            "timm_proj": _projection(self.source),
            "image_size": size or (height if height == width else [height, width]),
        }
        last = _last_name(self.source)
        if last is not None and last.startswith("head.") and self.source.get_submodule(last).bias is not None:
            config["timm_proj_bias"] = True
        return ImageTower(INHERIT, config, None, name, None)

    def fill(self, visual: Any, ids: Sequence[int | None], rotation: Tensor | None, seed: int) -> None:
        """Give a new tower the source's weights.

        Args:
            visual: The student's ``visual``, changed in place.
            ids: Not looked at: pictures have no tokens.
            rotation: [source's dim, student's dim]: what maps the embeddings, or None where they are the source's.
            seed: Draws the picture that the copy is compared on.

        Raises:
            ConfigError: If the copy cannot be made: the teacher's tower is not what its name says.
        """
        source = deepcopy(self.source).cpu().float().eval()
        weights, last = source.state_dict(), _last_name(source)
        if rotation is not None and last is None:
            raise ConfigError(
                'student.dim: the bare features of the teacher\'s picture tower, which student.image = "inherit" '
                f"copies, have the width {rotation.shape[0]}, and {rotation.shape[1]} is asked for; leave it out"
            )
        if rotation is not None:
            weights[f"{last}.weight"] = (rotation.T @ weights[f"{last}.weight"].flatten(1)).view(
                -1, *weights[f"{last}.weight"].shape[1:]
            )
            if f"{last}.bias" in weights:
                weights[f"{last}.bias"] = weights[f"{last}.bias"] @ rotation
        noise = torch.randn(1, 3, *visual.image_size, generator=torch.Generator().manual_seed(seed))
        try:
            visual.load_state_dict(weights)
        except RuntimeError as fault:
            raise ConfigError(_another_network(" ".join(str(fault).split())[:200])) from fault
        with torch.no_grad():
            wanted = source(noise) if rotation is None else source(noise) @ rotation
            if not torch.allclose(visual.eval()(noise), wanted, rtol=1e-3, atol=1e-4):
                raise ConfigError(_another_network("the copy embeds a picture differently"))


def plan_trunk(visual: Any, rule: InheritConfig) -> Trunk | None:
    """How a teacher's picture tower is inherited where it is a convolutional network of timm; None where it is not.

    Raises:
        ConfigError: If it is a convolutional network that cannot be inherited so.
    """
    if not isinstance(visual, TimmModel) or not any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) for part in visual.modules()
    ):
        return None
    faults = list(pruning_faults(visual))
    if faults:
        name = visual.trunk.default_cfg.get("architecture", type(visual.trunk).__name__)
        raise ConfigError(f"student.image: the teacher's picture tower {name} cannot be pruned: {'; '.join(faults)}")
    if rule.schedule:
        raise ConfigError(
            "student.inherit.schedule: the teacher's picture tower is a CNN, which is pruned at once; "
            "leave the schedule out, and set student.inherit.width"
        )
    return Trunk(visual, rule.width)


def _another_network(reason: str) -> str:
    return (
        f"student.image: the teacher's picture tower cannot be copied ({reason}): it was made in a way that its name "
        "does not say. Name a timm model, with student.prune"
    )


def _pool(trunk: Any) -> str:
    for part in (trunk, getattr(trunk, "head", None)):
        pool = getattr(part, "global_pool", None)
        kind = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if isinstance(kind, str) and kind:
            return kind
    return ""


def _projection(visual: Any) -> str:
    if hasattr(visual.head, "proj"):
        return "linear"
    if hasattr(visual.head, "mlp"):
        return "mlp"
    return "none" if _last_name(visual) is None else ""


def _last_name(visual: Any) -> str | None:
    """The name of the layer whose outputs are the embedding; None where those are the network's bare features."""
    for name in ("proj", "mlp"):
        if hasattr(visual.head, name):
            return "head.proj" if name == "proj" else "head.mlp.fc2"
    classifier = visual.trunk.get_classifier()
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        return None
    found: str = next(name for name, part in visual.named_modules() if part is classifier)
    return found
