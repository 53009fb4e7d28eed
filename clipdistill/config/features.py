"""The configuration of distilling intermediate representations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Protocol

from pydantic import Field

from clipdistill.config.base import Count, Section, Weight
from clipdistill.config.student import StudentConfig
from clipdistill.config.teacher import TeacherConfig
from clipdistill.config.train import TrainConfig

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
    """Of each tower's term, the mean over its blocks."""
    form: Literal["cosine", "mse"] = "cosine"
    pool: Literal["mean", "grid"] = "mean"
    """``mean`` averages a block's places or tokens to one vector; ``grid`` keeps ``cells`` x ``cells`` places of a
    picture and ``cells`` spans of a text, resampled where the towers differ."""
    cells: Annotated[int, Field(ge=1, le=16)] = 4
    store: Literal["auto", "cache", "live"] = "auto"
    """``auto`` stores the teacher's blocks beside its embeddings where they take at most ``max_bytes``; otherwise the
    teacher runs on each batch, as with ``live``."""
    max_bytes: Count = 2_000_000_000


class Sections(Protocol):
    """The sections that the distillation of blocks depends on."""

    teacher: TeacherConfig
    student: StudentConfig
    features: FeaturesConfig
    train: TrainConfig


def feature_faults(config: Sections) -> Iterator[str]:
    """What the distillation of inner blocks needs of the other sections, a sentence for each fault."""
    features, teacher = config.features, config.teacher
    sides = [side for side in ("image", "text") if getattr(features, side)]
    for side in sides:
        if teacher.embeddings is not None:
            yield f"features.{side}: blocks are taken from a teacher that runs; teacher.embeddings has none"
        if teacher.members:
            yield f"features.{side}: blocks are one network's, and teacher.members are several; give teacher.model"
    if features.image and config.student.image == "teacher":
        yield 'features.image: student.image = "teacher" keeps the teacher\'s picture tower: there is nothing to distil'
    if sides and not features.weight:
        yield f"features.weight: 0, so features.{sides[0]} trains nothing; raise it, or leave the blocks out"
    if sides and features.store == "cache" and config.train.mode != "cached":
        yield (
            f'features.store: "cache" does not go with train.mode = "{config.train.mode}", which shows views that are '
            'not stored; use "auto" or "live"'
        )
