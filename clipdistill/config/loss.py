"""The configuration of the losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from clipdistill.config.base import Above0, Count, Section, Weight
from clipdistill.core import curves
from clipdistill.core.errors import suggest

Preset = Literal["default", "clip", "open_clip", "tinyclip", "fd", "clip_kd", "clip_rd", "dime_fm", "mobileclip"]

TERMS = (
    "clip",
    "siglip",
    "affinity",
    "feature_cosine",
    "feature_mse",
    "interactive",
    "vertical",
    "cross",
    "gradient",
    "augmented_feature",
    "pseudo_relation",
    "queue",
    "masked_feature",
)
"""The keys that are weights, which a schedule may change."""


class LossConfig(Section):
    """A preset, and the weights that differ from it."""

    preset: Preset = "default"
    clip: Weight | None = None
    siglip: Weight | None = None
    affinity: Weight | None = None
    feature_cosine: Weight | None = None
    feature_mse: Weight | None = None
    interactive: Weight | None = None
    vertical: Weight | None = None
    """CLIP-RD's VRD."""
    cross: Weight | None = None
    """CLIP-RD's XRD."""
    pseudo_relation: Weight | None = None
    """DIME-FM's relation within a modality, for unpaired rows."""
    masked_feature: Weight | None = None
    """CLIP-KD's MFD: the feature loss of pictures with most patches masked."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    gradient: Weight | None = None
    """CLIP-KD's GD."""
    augmented_feature: Weight | None = None
    """CLIP-KD's AFD."""
    queue: Weight | None = None
    """The student's similarities to a queue of the teacher's stored embeddings should be the teacher's."""
    queue_rows: Count | None = None
    """How many of the teacher's stored pictures and texts a step's queue has."""
    schedule: dict[str, tuple[tuple[float, float], ...]] = Field(default_factory=dict)
    """Factors of the weights over the training: {clip = [[0.0, 0.0], [0.5, 1.0]]}, each point a share of the steps and
    a factor, straight lines between them."""
    balance: Literal["fixed", "uncertainty"] | None = None
    """``uncertainty`` learns one factor a term (Kendall et al. 2018)."""
    temperature: Above0 | None = None
    teacher_scale: Above0 | None = None
    student_scale: Above0 | None = None
    affinity_rows: Literal["all", "pairs"] | None = None
    multi_positive: bool | None = None

    @model_validator(mode="after")
    def _usable(self) -> LossConfig:
        faults = [*self._schedule_faults()]
        if self.queue and self.queue_rows is not None and self.queue_rows < 2:
            faults.append(f"loss.queue_rows: loss.queue compares rows, so it needs 2 or more, got {self.queue_rows}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _schedule_faults(self) -> Iterator[str]:
        for name, points in self.schedule.items():
            if name not in TERMS:
                yield f"loss.schedule.{name}: there is no such weight; {suggest(name, TERMS)}"
            yield from (f"loss.schedule.{name}: {fault}" for fault in curves.faults_of(points))
