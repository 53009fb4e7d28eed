"""The inner blocks of a tower: which there are, and how one is named or found by its depth."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from clipdistill.core.errors import ConfigError, suggest
from clipdistill.towers import context
from clipdistill.towers.student import Side

# The blocks of a tower by the names that its kind gives them, of which the first kind that fits counts.
_IMAGE_KINDS = (
    r"transformer\.resblocks\.\d+",  # open_clip's ViT
    r"trunk\.blocks\.\d+",  # timm's ViTs: blocks; MobileNet, EfficientNet: stages
    r"trunk\.stages\.\d+",  # ConvNeXt, FastViT, MobileViT
    r"(trunk\.)?(layer|stage)\d+",  # ResNets of both; HRNet
    r"trunk\.layers\.\d+",  # Swin
    r"trunk\.s\d+",  # RegNet
    r"trunk\.level\d+",  # DLA
    r"trunk\.features\.(denseblock)?\d+",  # VGG, DenseNet
)
_TEXT_KINDS = (
    r"transformer\.resblocks\.\d+",  # open_clip's own
    r"transformer\.encoder\.(layer|layers|block)\.\d+",  # BERT, RoBERTa; T5
    r"transformer\.(layer|layers|h)\.\d+",  # DistilBERT, ModernBERT; GPT-2
)
_ROUNDING = 1e-9


def tower_of(model: Any, side: Side) -> Any:
    """The part of an open_clip model that embeds pictures or texts; block names are relative to it."""
    return model.visual if side == "image" else context.text_module(model)


def blocks_of(tower: nn.Module, side: Side) -> tuple[str, ...]:
    """The names of a tower's blocks or stages, the shallowest first; none where its kind is not known."""
    names = [name for name, _ in tower.named_modules()]
    for kind in _IMAGE_KINDS if side == "image" else _TEXT_KINDS:
        found = tuple(name for name in names if re.fullmatch(kind, name))
        if found:
            return found
    return ()


def find_block(tower: nn.Module, side: Side, wanted: str | float, field: str) -> str:
    """The name of the module that a configuration asks for.

    Args:
        tower: The tower, as :func:`tower_of` gives it.
        side: Which one it is.
        wanted: A module's dotted name (``trunk.blocks.4``), or a share of the depth: of n blocks the number
            ``ceil(share n)``, counted from 1, so that 1.0 is the last, 0.5 the middle one, and 0.0 the first.
        field: The key of the configuration, for messages.

    Raises:
        ConfigError: If there is no such module, with the nearest name; or a share is asked of a tower whose blocks
            are not known.
    """
    blocks = blocks_of(tower, side)
    if isinstance(wanted, str):
        return _named(tower, side, wanted, blocks, field)
    if not 0 <= wanted <= 1:
        raise ConfigError(f"{field}: a share of the depth is between 0 and 1, got {wanted:g}")
    if not blocks:
        raise ConfigError(
            f"{field}: {wanted:g} of the depth is asked for, but the blocks of this {side} tower are not known; name "
            f"the module instead; {suggest('', _modules(tower, side))}"
        )
    return blocks[max(0, math.ceil(wanted * len(blocks) - _ROUNDING) - 1)]


def _named(tower: nn.Module, side: Side, wanted: str, blocks: tuple[str, ...], field: str) -> str:
    modules = _modules(tower, side)
    if wanted in modules:
        return wanted
    shown = f"; its blocks are {blocks[0]} to {blocks[-1]}" if blocks else ""
    raise ConfigError(f"{field}: the {side} tower has no module {wanted!r}; {suggest(wanted, modules)}{shown}")


def _modules(tower: nn.Module, side: Side) -> set[str]:
    """The names of all modules of a tower; a plain CLIP is its own text tower, and its pictures' is none of it."""
    names = {name for name, _ in tower.named_modules() if name}
    return {name for name in names if side == "image" or name.split(".")[0] != "visual"}
