"""From a source and a configuration's shares to a tower that a student is built with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.config import InheritConfig
from clipdistill.core.errors import ConfigError
from clipdistill.towers.blueprint import INHERIT, ImageTower, Json, TextTower
from clipdistill.towers.inheritance.cut import Kept, choose, cut, resized_positions, rows_of
from clipdistill.towers.inheritance.importance import measure
from clipdistill.towers.inheritance.refit import refit
from clipdistill.towers.inheritance.shape import Shape
from clipdistill.towers.inheritance.tower import Side, Tower, tower_of


@dataclass(frozen=True)
class Calibration:
    """The rows that importance is measured on and that layers are fitted to.

    Attributes:
        pixels: float32 [pictures, 3, height, width], prepared as the source prepares them.
        tokens: int64 [texts, length], as the source's tokenizer gives them.
    """

    pixels: Tensor
    tokens: Tensor

    def of(self, side: Side) -> Tensor:
        """The rows of one tower."""
        return self.pixels if side == "image" else self.tokens


@dataclass(frozen=True)
class Cut:
    """A transformer tower that is to be cut, and how.

    Attributes:
        source: The tower.
        shape: The measures that are left.
        kept: Which parts are kept.
        inputs: Its calibration rows.
        fits: Whether layers are fitted to the source after the cut.
    """

    source: Tower
    shape: Shape
    kept: Kept
    inputs: Tensor
    fits: bool

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.shape == self.source.shape

    def image_tower(self, size: int | None) -> ImageTower:
        """The picture tower as a part of a ``model_cfg``; ``size`` is the side in pixels, None the source's."""
        visual, shape = self.source.module, self.shape
        config: Json = {
            "image_size": size or _number_or_list(visual.image_size),
            "patch_size": _number_or_list(visual.patch_size),
            "head_width": shape.head_width,
            "no_ln_pre": self.source.first_norm is None,
            "final_ln_after_pool": bool(visual.final_ln_after_pool),
            "pool_type": self.source.pool,
        }
        return ImageTower(INHERIT, config | _common(self.source, shape), None, None, self.source.quick_gelu)

    def text_tower(self) -> TextTower:
        """The text tower as a part of a ``model_cfg``."""
        config: Json = {
            "context_length": len(self.source.module.positional_embedding),
            "heads": self.shape.heads,
            "pool_type": self.source.pool,
            "proj_bias": self.source.projection_bias is not None,
        }
        return TextTower(INHERIT, config | _common(self.source, self.shape), None, False, self.source.quick_gelu)

    def fill(self, module: Any, ids: Sequence[int | None], rotation: Tensor | None, seed: int) -> None:
        """Give a new tower of this shape its weights.

        Args:
            module: The student's ``visual`` or ``text``, changed in place.
            ids: For each of the student's tokens the source's row, or None; not looked at for pictures.
            rotation: [source's dim, student's dim]: what maps the embeddings, or None where they are the source's.
            seed: Draws the rows of tokens that the source does not have.
        """
        weights = cut(self.source, self.kept)
        if self.source.side == "image":
            grids = self.source.module.grid_size, module.grid_size
            weights["positional_embedding"] = resized_positions(weights["positional_embedding"], *grids)
        else:
            generator = torch.Generator().manual_seed(seed)
            weights["token_embedding.weight"] = rows_of(weights["token_embedding.weight"], ids, generator)
        if rotation is not None:
            weights |= _turned(weights, rotation)
        module.load_state_dict(weights)
        if self.fits and not self.whole:
            refit(self.source, Tower(self.source.side, module), self.kept, self.inputs, rotation)


def plan_cut(
    model: Any,
    side: Side,
    rule: InheritConfig,
    calibration: Calibration,
    *,
    like: Shape | None = None,
    seed: int = 0,
) -> Cut:
    """Choose what a student's tower keeps of its source's.

    Args:
        model: The open_clip model that it is cut out of: the teacher's, or a larger student's.
        side: Which tower.
        rule: The shares that are kept, and by what.
        calibration: Rows to measure importance on.
        like: The measures that the shares are of; None takes the source's own.
        seed: Decides what is random in measuring.

    Raises:
        ConfigError: If the tower is of a kind that cannot be cut, or the shares do not go together.
    """
    source = tower_of(model, side)
    shape = (like or source.shape).scaled(rule)
    inputs = calibration.of(side)
    if side == "text" and len(inputs):
        inputs = inputs[:, : int(source.ends(inputs).max()) + 1]  # what follows the end tokens reaches no embedding
    measured = shape != source.shape and "importance" in (rule.depth_by, rule.width_by)
    if (measured or (rule.refit and shape != source.shape)) and not len(inputs):
        raise ConfigError(
            f"student.inherit: data.train has no {'pictures' if side == 'image' else 'texts'} to measure importance "
            f'on; add some, or set depth_by = "stride", width_by = "first" and refit = false'
        )
    scores = measure(source, inputs, rule.importance, seed) if measured else None
    return Cut(source, shape, choose(source.shape, shape, rule, scores), inputs, rule.refit)


def source_ids(cut: Cut, tokenizer: Any, ids: Sequence[int | None]) -> list[int | None]:
    """The source's rows of a pruned vocabulary, its start and end tokens with them.

    Args:
        cut: The text tower that is cut.
        tokenizer: The source's own.
        ids: :attr:`Vocabulary.teacher_ids`, which leave out padding, start and end.

    Raises:
        ConfigError: If the source does not put its texts between one start and one end token, as a student does.
    """
    empty = tokenizer([""])
    if int(cut.source.ends(empty)[0]) != 1:
        raise ConfigError(
            f'student.text: "inherit" needs a teacher whose tokenizer puts one start and one end token around a text; '
            f"{type(tokenizer).__name__} turns an empty one into {empty[0, :4].tolist()}; name a text tower (such as "
            'nano) and set student.text_init = "inherit", which takes the token table'
        )
    start, end = empty[0, :2].tolist()
    return [0, *ids[1:-2], start, end]


def _common(tower: Tower, shape: Shape) -> Json:
    """What open_clip's ``vision_cfg`` and ``text_cfg`` share."""
    block: Any = tower.blocks[0]
    config: Json = {"width": shape.width, "layers": shape.layers, "mlp_ratio": shape.mlp_ratio}
    if not isinstance(block.ls_1, nn.Identity):
        config["ls_init_value"] = 1e-5  # that there is a layer scale; its values are the source's
    if tower.last_norm.eps != nn.LayerNorm(1).eps:
        config["norm_kwargs"] = {"eps": tower.last_norm.eps}
    approximate = getattr(block.mlp.gelu, "approximate", "none")
    if approximate != "none":
        config["act_kwargs"] = {"approximate": approximate}
    return config


def _turned(weights: dict[str, Tensor], rotation: Tensor) -> dict[str, Tensor]:
    """The last projection, mapped to another space of embeddings."""
    if "text_projection.weight" in weights:
        names = ("text_projection.weight", "text_projection.bias")
        return {names[0]: rotation.T @ weights[names[0]], names[1]: weights[names[1]] @ rotation}
    name = "proj" if "proj" in weights else "text_projection"
    return {name: weights[name] @ rotation}


def _number_or_list(size: Sequence[int]) -> int | list[int]:
    height, width = (int(side) for side in size)
    return height if height == width else [height, width]
