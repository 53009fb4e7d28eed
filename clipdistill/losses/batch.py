"""What the losses are measured on: a batch's embeddings of both sides, and what is known of their teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipdistill.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One batch's embeddings of one side.

    Attributes:
        images: Unit rows [images, dim].
        texts: Unit rows [texts, dim].
    """

    images: Tensor
    texts: Tensor

    def first(self, count: int) -> Embeddings:
        """The first so many images and texts: a batch's pairs."""
        return Embeddings(self.images[:count], self.texts[:count])

    def at_full_precision(self) -> Embeddings:
        """The same in float32 at least: at a scale of 100 a bfloat16 logit is wrong by up to 0.25."""
        return Embeddings(full_precision(self.images), full_precision(self.texts))

    def as_constants(self, like: Tensor) -> Embeddings:
        """The same without gradients, where and as precise as another tensor."""
        return Embeddings(self.images.detach().to(like), self.texts.detach().to(like))


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher and the data say about one batch.

    Attributes:
        teacher: Unit rows [images, D] and [texts, D], in the order of the student's.
        positives: bool [pairs, pairs]; [i, j] where text j describes image i, the diagonal always.
        pairs: The first so many images and texts are paired, row by row; the others are unpaired. May be 0.
        queue: Further unit rows of the teacher, [queued images, D] and [queued texts, D], for the queue loss.
        own_images: Whether the student's images are its own. Where they are the teacher's, as constants, what compares
            images with the teacher's alone is left out: there is nothing to learn from it.
    """

    teacher: Embeddings
    positives: Tensor
    pairs: int
    queue: Embeddings | None = None
    own_images: bool = True


@dataclass(frozen=True, slots=True)
class ExtraTerm:
    """A term of the sum that is measured elsewhere: of inner blocks, or of a task.

    Attributes:
        name: As it is reported.
        weight: How much it counts.
        value: The loss, attached to what it trains.
    """

    name: str
    weight: float
    value: Tensor


@dataclass(frozen=True, slots=True)
class Member:
    """One teacher of an ensemble whose probabilities are averaged.

    Attributes:
        columns: Where its embedding lies in the ensemble's concatenated rows.
        scale: Its inverse temperature.
        weight: How much it counts, against the other members' weights.
    """

    columns: slice
    scale: float
    weight: float

    def faults(self) -> Iterator[str]:
        """What is wrong with it, a sentence each."""
        start, stop = self.columns.start, self.columns.stop
        if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop and self.columns.step is None):
            yield f"a teacher's columns must be slice(start, stop) with 0 <= start < stop; got {self.columns}"
        for name in ("scale", "weight"):
            if not is_scale(getattr(self, name)):
                yield f"a teacher's {name} must be a finite number above 0; got {getattr(self, name)}"


@dataclass(frozen=True, slots=True)
class TeacherScale:
    """How the teacher turns cosines into logits.

    Attributes:
        scale: Its inverse temperature (the exponential of ``logit_scale``).
        bias: Its SigLIP bias, or None.
        members: The teachers of an ensemble whose probabilities are averaged, not their logits. The teacher's rows are
            then theirs side by side. Empty = one teacher, or one that speaks as one.

    Raises:
        ConfigError: If the scale is not a finite number above 0, or the bias not finite, or so for a member.
    """

    scale: float
    bias: float | None
    members: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        faults = []
        if not is_scale(self.scale):
            faults.append(f"the teacher's logit scale must be a finite number above 0; got {self.scale}")
        if self.bias is not None and not math.isfinite(self.bias):
            faults.append(f"the teacher's logit bias must be finite; got {self.bias}")
        faults += [fault for member in self.members for fault in member.faults()]
        if faults:
            raise ConfigError(faults)

    def at(self, scale: float | None) -> TeacherScale:
        """The same teacher at another inverse temperature, every member too; None = its own."""
        if scale is None:
            return self
        return replace(self, scale=scale, members=tuple(replace(member, scale=scale) for member in self.members))


@dataclass(frozen=True, slots=True)
class LossTerms:
    """One batch's losses.

    Attributes:
        total: The weighted sum, to call ``backward`` on; always attached to the student's embeddings, even where no
            term applies and it is 0.
        parts: Each term of the objective that has rows in this batch and a weight above 0 at this point of the
            training, unweighted and detached, in the order ``clip, siglip, affinity, feature_image, feature_text,
            interactive, vertical, cross, gradient, augmented_feature, pseudo_relation, queue``; the same at narrower
            widths, each with its width behind an @; ``masked_feature``; further terms; and the learned
            ``log_variance_...`` of each weight, where they balance. The feature terms are always reported as 1 - cos,
            whichever form is trained, so that runs compare over forms and widths.
    """

    total: Tensor
    parts: dict[str, Tensor]


def full_precision(rows: Tensor) -> Tensor:
    """The same in float32 at least."""
    return rows if rows.dtype == torch.float64 else rows.float()


def is_scale(value: float) -> bool:
    """Whether a number can be an inverse temperature."""
    return math.isfinite(value) and value > 0
