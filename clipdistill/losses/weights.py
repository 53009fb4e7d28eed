"""How much each loss counts, and when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from clipdistill.config.loss import TERMS
from clipdistill.core import curves
from clipdistill.core.errors import ConfigError, suggest
from clipdistill.losses.affinity import AffinityForm
from clipdistill.losses.batch import is_scale

AffinityRows = Literal["all", "pairs"]
Balance = Literal["fixed", "uncertainty"]

TERM_WEIGHTS = TERMS
"""The weights among the attributes of :class:`LossWeights`."""


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How much each loss counts, and the settings of those that have some. A weight of 0 leaves the loss out.

    Attributes:
        clip: Weight of the CLIP task loss.
        siglip: Weight of the SigLIP task loss.
        affinity: Weight of the affinity loss.
        feature_cosine: Weight of 1 - cos, for each modality.
        feature_mse: Weight of the mean squared error over rows and width, for each modality: the same loss as
            ``2 / D`` of 1 - cos.
        interactive: Weight of the interactive loss.
        vertical: Weight of the vertical relational loss.
        cross: Weight of the cross relational loss.
        gradient: Weight of the gradient loss.
        augmented_feature: Weight of the augmented feature loss.
        pseudo_relation: Weight of the pseudo-relation loss.
        queue: Weight of the queue loss.
        masked_feature: Weight of 1 - cos of the pictures with most patches masked.
        temperature: T of the affinity and the queue loss: divides both sides' logits, and multiplies the loss by its
            square.
        teacher_scale: The teacher's inverse temperature in the losses that compare distributions; None takes the
            teacher's own.
        student_scale: The student's inverse temperature, fixed; None learns it.
        affinity_rows: ``all`` compares every image with every text of the batch, paired or not, as the teacher can
            score any two; ``pairs`` keeps to the paired rows, as published. The same where all rows are paired.
        affinity_form: ``kl`` or ``cross_entropy``: equal gradients, different values.
        multi_positive: Whether a text that describes several images of the batch is a positive of each; otherwise
            only its own row is.
        mask_ratio: The share of a picture's patches that is masked for ``masked_feature``.
        queue_rows: How many stored pictures, and how many stored texts, a step's queue has at most.
        schedule: Factors of single weights over the training, by the weight's name: points of a share of the steps
            and a factor, straight lines between them.
        balance: ``fixed``, or ``uncertainty``: beside each weight a log-variance is learned.

    Raises:
        ConfigError: Naming every value that is out of its range.
    """

    clip: float = 0.0
    siglip: float = 0.0
    affinity: float = 0.0
    feature_cosine: float = 0.0
    feature_mse: float = 0.0
    interactive: float = 0.0
    vertical: float = 0.0
    cross: float = 0.0
    gradient: float = 0.0
    augmented_feature: float = 0.0
    pseudo_relation: float = 0.0
    queue: float = 0.0
    masked_feature: float = 0.0
    temperature: float = 1.0
    teacher_scale: float | None = None
    student_scale: float | None = None
    affinity_rows: AffinityRows = "all"
    affinity_form: AffinityForm = "kl"
    multi_positive: bool = True
    mask_ratio: float = 0.75
    queue_rows: int = 4096
    schedule: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    balance: Balance = "fixed"

    def __post_init__(self) -> None:
        faults = [*self._range_faults(), *self._choice_faults(), *self._schedule_faults()]
        if faults:
            raise ConfigError(faults)

    @property
    def weighted(self) -> tuple[str, ...]:
        """The names of the weights above 0."""
        return tuple(name for name in TERM_WEIGHTS if getattr(self, name))

    def at(self, share: float) -> dict[str, float]:
        """The weights above 0 at a point of the training, by name.

        Args:
            share: The share of the steps that is done.
        """
        factors = {name: curves.value_at(points, share) for name, points in self.schedule.items()}
        scheduled = {name: getattr(self, name) * factors.get(name, 1.0) for name in self.weighted}
        return {name: weight for name, weight in scheduled.items() if weight}

    def _range_faults(self) -> Iterator[str]:
        for name in TERM_WEIGHTS:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                yield f"loss.{name} must be a finite number, 0 or more; got {getattr(self, name)}"
        for name in ("temperature", "teacher_scale", "student_scale"):
            if getattr(self, name) is not None and not is_scale(getattr(self, name)):
                yield f"loss.{name} must be a finite number above 0; got {getattr(self, name)}"
        if not 0 < self.mask_ratio < 1:
            yield f"loss.mask_ratio must lie between 0 and 1; got {self.mask_ratio}"
        if self.queue and self.queue_rows < 2:
            yield f"loss.queue_rows must be 2 or more for loss.queue, which compares rows; got {self.queue_rows}"

    def _choice_faults(self) -> Iterator[str]:
        for name, kind in (("affinity_rows", AffinityRows), ("affinity_form", AffinityForm), ("balance", Balance)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                yield f"loss.{name} = {value!r} is unknown; {suggest(value, known)}"

    def _schedule_faults(self) -> Iterator[str]:
        for name, points in self.schedule.items():
            if name not in TERM_WEIGHTS:
                yield f"loss.schedule.{name}: there is no such weight; {suggest(name, TERM_WEIGHTS)}"
            elif not getattr(self, name):
                yield f"loss.schedule.{name}: loss.{name} is 0, so that no factor changes it; give it a weight"
            yield from (f"loss.schedule.{name}: {fault}" for fault in curves.faults_of(points))
