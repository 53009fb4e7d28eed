"""The terms of the sum on one batch: which losses have rows, and what they are given."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipdistill.losses.affinity import affinity_loss
from clipdistill.losses.augmented_feature import AugmentedFeature
from clipdistill.losses.batch import Embeddings, TeacherScale
from clipdistill.losses.contrastive import clip_loss, siglip_loss
from clipdistill.losses.feature import cosine_loss, mse_loss
from clipdistill.losses.gradient import gradient_loss
from clipdistill.losses.interactive import interactive_loss
from clipdistill.losses.pseudo_relation import pseudo_relation_loss
from clipdistill.losses.queue import queue_loss
from clipdistill.losses.relational import cross_loss, vertical_loss
from clipdistill.losses.weights import LossWeights


@dataclass(frozen=True, slots=True)
class Term:
    """One measured loss.

    Attributes:
        name: As it is reported.
        weight: The name of its weight.
        loss: Its value, attached to what it trains.
        reported: Its value as it is reported, where that is another one.
    """

    name: str
    weight: str
    loss: Tensor
    reported: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """One batch at one width, all at one precision.

    Attributes:
        student: The student's own unit rows.
        projected: The same in the teacher's width.
        teacher: The teacher's unit rows.
        positives: bool [pairs, pairs].
        pairs: How many rows are paired.
        queue: Further unit rows of the teacher, or None.
        own_images: Whether the student's images are its own; otherwise they are the teacher's.
    """

    student: Embeddings
    projected: Embeddings
    teacher: Embeddings
    positives: Tensor
    pairs: int
    queue: Embeddings | None
    own_images: bool = True

    def paired(self) -> Rows:
        """The pairs alone."""
        sides = (self.student.first(self.pairs), self.projected.first(self.pairs), self.teacher.first(self.pairs))
        return Rows(*sides, self.positives, self.pairs, self.queue, self.own_images)


@dataclass(frozen=True, slots=True)
class Scales:
    """The inverse temperatures, and what else turns cosines into logits.

    Attributes:
        student: Of the student's own cosines.
        bias: The student's SigLIP bias.
        interactive: Of the student's cosines with the teacher's other modality.
        image: Of the student's cosines with the teacher's among pictures.
        text: The same among texts.
        teacher: The teacher's own.
    """

    student: Tensor | float
    bias: Tensor
    interactive: Tensor
    image: Tensor | float
    text: Tensor | float
    teacher: TeacherScale


def measure(
    rows: Rows, weights: LossWeights, wanted: Collection[str], scales: Scales, fuse: AugmentedFeature | None
) -> Iterator[Term]:
    """The terms of a batch, in their fixed order.

    Args:
        rows: The batch.
        weights: The settings of the losses.
        wanted: The names of the weights whose terms are asked for; a term without rows is left out.
        scales: How cosines become logits.
        fuse: What the augmented feature loss learns; None where it is not wanted.
    """
    paired = rows.paired()
    if rows.pairs:
        yield from _task_terms(paired, wanted, scales)
    if "affinity" in wanted:
        yield from _affinity_terms(rows if weights.affinity_rows == "all" else paired, weights, scales)
    if rows.own_images:
        yield from _feature_terms("feature_image", wanted, rows.projected.images, rows.teacher.images)
    yield from _feature_terms("feature_text", wanted, rows.projected.texts, rows.teacher.texts)
    if rows.pairs:
        yield from _anchored_terms(paired, weights, wanted, scales)
        if "augmented_feature" in wanted and fuse is not None:
            loss = fuse(paired.student, paired.teacher, scales.student, rows.positives)
            yield Term("augmented_feature", "augmented_feature", loss)
    yield from _unpaired_terms(rows, weights, wanted, scales.teacher)


def _task_terms(rows: Rows, wanted: Collection[str], scales: Scales) -> Iterator[Term]:
    images, texts = rows.student.images, rows.student.texts
    if "clip" in wanted:
        yield Term("clip", "clip", clip_loss(images, texts, scales.student, rows.positives))
    if "siglip" in wanted:
        yield Term("siglip", "siglip", siglip_loss(images, texts, scales.student, scales.bias, rows.positives))


def _affinity_terms(rows: Rows, weights: LossWeights, scales: Scales) -> Iterator[Term]:
    if not (len(rows.student.images) and len(rows.student.texts)):
        return
    loss = affinity_loss(
        rows.student.images,
        rows.student.texts,
        rows.teacher.images,
        rows.teacher.texts,
        scales.student,
        scales.teacher.scale,
        weights.temperature,
        weights.affinity_form,
        scales.teacher.members,
    )
    yield Term("affinity", "affinity", loss)


def _feature_terms(name: str, wanted: Collection[str], student: Tensor, teacher: Tensor) -> Iterator[Term]:
    if not len(student) or not {"feature_cosine", "feature_mse"}.intersection(wanted):
        return
    cosine = cosine_loss(student, teacher)
    if "feature_cosine" in wanted:
        yield Term(name, "feature_cosine", cosine)
    if "feature_mse" in wanted:
        yield Term(name, "feature_mse", mse_loss(student, teacher), reported=cosine)


def _anchored_terms(rows: Rows, weights: LossWeights, wanted: Collection[str], scales: Scales) -> Iterator[Term]:
    """The terms of pairs, of the student's rows in the teacher's width against the teacher's."""
    sides = (rows.projected.images, rows.projected.texts, rows.teacher.images, rows.teacher.texts)
    if "interactive" in wanted:
        yield Term("interactive", "interactive", interactive_loss(*sides, scales.interactive, rows.positives))
    if "vertical" in wanted:
        same = [_same(side, weights.multi_positive) for side in sides[2:]]
        yield Term("vertical", "vertical", vertical_loss(*sides, scales.image, scales.text, *same))
    if "cross" in wanted:
        yield Term("cross", "cross", cross_loss(*sides, scales.interactive))
    if "gradient" in wanted:
        loss = gradient_loss(*sides, scales.student, scales.teacher.scale, rows.positives)
        yield Term("gradient", "gradient", loss)


def _unpaired_terms(rows: Rows, weights: LossWeights, wanted: Collection[str], teacher: TeacherScale) -> Iterator[Term]:
    """The terms that are measured within each modality, or against stored rows, and added up."""
    projected, stored = rows.projected, rows.teacher
    first = 0 if rows.own_images else 1  # the pictures' side, then the texts'
    if "pseudo_relation" in wanted:
        sides = ((projected.images, stored.images), (projected.texts, stored.texts))
        yield from _sum(
            "pseudo_relation", [pseudo_relation_loss(*side, teacher.scale) for side in sides[first:] if len(side[0])]
        )
    if "queue" in wanted and rows.queue is not None:
        crossed = (
            (projected.images, stored.images, rows.queue.texts),
            (projected.texts, stored.texts, rows.queue.images),
        )
        losses = [
            queue_loss(*each, teacher.scale, weights.temperature, teacher.members)
            for each in crossed[first:]
            if all(len(side) for side in each)
        ]
        yield from _sum("queue", [loss / 2 for loss in losses])


def _sum(name: str, losses: Sequence[Tensor]) -> Iterator[Term]:
    if losses:
        yield Term(name, name, torch.stack(list(losses)).sum())


def _same(rows: Tensor, multi_positive: bool) -> Tensor:
    """Bool [rows, rows]: where two rows are equal, which the teacher's are for the same text or the same view."""
    numbers = torch.arange(len(rows), device=rows.device)
    if multi_positive:
        numbers = torch.unique(rows, dim=0, return_inverse=True)[1]
    return numbers[:, None] == numbers[None, :]
