"""The configuration of distilling intermediate representations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from clipdistill.config.base import Count, Section, Weight

Block = str | Annotated[float, Field(ge=0, le=1)]
"""A module by name (``trunk.blocks.4``), or a share of the tower's depth: 0.5 is its middle block, 1.0 its last."""


class BlockConfig(Section):
    """One block of the student, and the teacher's that it should resemble."""

    student: Block
    teacher: Block


class FeaturesConfig(Section):
    """Which inner blocks of the towers are distilled, besides the final embeddings."""

    image: tuple[BlockConfig, ...] = ()
    text: tuple[BlockConfig, ...] = ()
    weight: Weight = 1.0
    form: Literal["cosine", "mse"] = "cosine"
    pool: Literal["mean", "grid"] = "mean"
    """``mean`` averages a block's places or tokens to one vector; ``grid`` keeps ``cells`` x ``cells`` places of a
    picture (and as many spans of a text), resampled where the towers differ."""
    cells: Annotated[int, Field(ge=1, le=16)] = 4
    store: Literal["auto", "cache", "live"] = "auto"
    """``auto`` stores the teacher's blocks beside its embeddings where they take at most ``max_bytes``."""
    max_bytes: Count = 2_000_000_000
