"""How large a transformer tower is, and how large a share of it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipdistill.config import InheritConfig
from clipdistill.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """A transformer's measures.

    Attributes:
        layers: Blocks.
        heads: Attention heads of each block.
        head_width: The width of a head, which no cut changes.
        hidden: Hidden units of each block's MLP.
    """

    layers: int
    heads: int
    head_width: int
    hidden: int

    @property
    def width(self) -> int:
        """The width of the residual stream; in open_clip's blocks the heads together are as wide."""
        return self.heads * self.head_width

    @property
    def mlp_ratio(self) -> float:
        """The number that open_clip multiplies the width with and rounds down to the hidden units."""
        ratio = self.hidden / self.width
        return ratio if int(self.width * ratio) == self.hidden else (self.hidden + 0.5) / self.width

    def scaled(self, rule: InheritConfig) -> Shape:
        """The measures that the shares of a configuration leave, each rounded, and at least 1.

        Raises:
            ConfigError: If the shares of width and heads come to different numbers of heads.
        """
        heads = share_of(rule.width, self.heads)
        wanted = heads if rule.heads is None else share_of(rule.heads, self.heads)
        if wanted != heads:
            raise ConfigError(
                f"student.inherit.heads: {rule.heads} of {self.heads} heads are {wanted}, but student.inherit.width = "
                f"{rule.width} leaves {heads}: open_clip's blocks are as wide as their heads together, so both go with "
                "one share; leave student.inherit.heads out"
            )
        mlp = rule.width if rule.mlp is None else rule.mlp
        return Shape(share_of(rule.depth, self.layers), heads, self.head_width, share_of(mlp, self.hidden))


def share_of(share: float, whole: int) -> int:
    """A share of a count, rounded half up, at least 1."""
    return max(1, math.floor(share * whole + 0.5))
