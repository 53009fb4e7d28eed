"""What a student is trained to minimise: the weighted sum of the losses, with every term reported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn

from clipdistill.core.errors import ConfigError
from clipdistill.losses.augmented_feature import AugmentedFeature
from clipdistill.losses.balance import Uncertainty
from clipdistill.losses.batch import (
    Embeddings,
    ExtraTerm,
    LossTerms,
    Member,
    Targets,
    TeacherScale,
    full_precision,
)
from clipdistill.losses.feature import cosine_loss
from clipdistill.losses.shapes import refuse_mismatch, refuse_mismatched_teacher
from clipdistill.losses.terms import Rows, Scales, Term, measure
from clipdistill.losses.weights import AffinityRows, LossWeights

__all__ = [
    "MAX_SCALE",
    "AffinityRows",
    "Embeddings",
    "ExtraTerm",
    "LossTerms",
    "LossWeights",
    "Member",
    "Objective",
    "Targets",
    "TeacherScale",
]

MAX_SCALE = 100.0  # CLIP's bound on a learned inverse temperature
_CLIP_SCALE = 1 / 0.07
_SIGLIP_SCALE, _SIGLIP_BIAS = 10.0, -10.0
_PAIRS = "pictures paired with texts"
_NEED_PAIRS = ("clip", "siglip", "interactive", "vertical", "cross", "gradient", "augmented_feature")
Width = tuple[Embeddings, Embeddings]


@final
class Objective(nn.Module):
    """The weighted sum of the losses, and what is learned with the student: scales, bias, and the losses' own maps.

    ``logit_scale`` and ``icl_scale`` hold logarithms; they start at ln(1/0.07) (``logit_scale`` at ln 10 with the
    SigLIP loss, and ``logit_bias`` at -10) and are held at ln 100 or below. All three are always in the state dict;
    only those that the weights train ask for a gradient. The vertical relational loss adds ``vertical_scales`` (among
    pictures, among texts), the augmented feature loss its two maps, and balancing its log-variances.

    Args:
        weights: How much each loss counts.
        teacher: How the teacher turns cosines into logits.
        dim: The width of the student's embeddings; only the augmented feature loss needs it.
        teacher_dim: The width of the teacher's; the same.
        further: Whether terms from elsewhere are added to every batch, so that all of its own may be left out.

    Raises:
        ConfigError: If every weight is 0 with nothing added, or a width is missing.
    """

    def __init__(
        self,
        weights: LossWeights,
        teacher: TeacherScale,
        *,
        dim: int | None = None,
        teacher_dim: int | None = None,
        further: bool = False,
    ) -> None:
        super().__init__()
        if not (weights.weighted or further):
            raise ConfigError('loss: every weight is 0, so nothing can be trained; set one, or loss.preset = "default"')
        self.weights = weights
        self.teacher = teacher
        self._speaker = teacher.at(weights.teacher_scale)
        # With no loss on the student's own logits its scale cannot be learned. It imitates the teacher's vectors then,
        # so the teacher's scale is the one to ship it with.
        self._takes_teachers_scale = (
            not (weights.clip or weights.siglip or weights.affinity) and weights.student_scale is None
        )
        self._fixed_scale = teacher.scale if self._takes_teachers_scale else weights.student_scale
        start = self._fixed_scale or (_SIGLIP_SCALE if weights.siglip else _CLIP_SCALE)
        self.logit_scale = _parameter(math.log(start), learned=self._fixed_scale is None)
        self.logit_bias = _parameter(_SIGLIP_BIAS, learned=weights.siglip > 0)
        # The cross relational loss shares this scale, and does not learn it alone: it would bring it to 0.
        self.icl_scale = _parameter(math.log(_CLIP_SCALE), learned=weights.interactive > 0)
        self.vertical_scales = nn.Parameter(torch.full((2,), math.log(_CLIP_SCALE))) if weights.vertical else None
        self.fuse = _fuse(dim, teacher_dim) if weights.augmented_feature else None
        self.uncertainty = Uncertainty(weights.weighted) if weights.balance == "uncertainty" else None

    def forward(
        self,
        student: Embeddings,
        projected: Embeddings,
        targets: Targets,
        *,
        masked: Tensor | None = None,
        narrower: Sequence[Width] = (),
        extra: Sequence[ExtraTerm] = (),
        share: float = 0.0,
    ) -> LossTerms:
        """Measure one batch.

        Args:
            student: The student's own unit embeddings [images, d] and [texts, d].
            projected: The same in the teacher's width [images, D] and [texts, D]; the same object where d = D.
            targets: The teacher's embeddings, and which texts describe which images.
            masked: The student's unit embeddings in the teacher's width of the same pictures with patches masked.
            narrower: The student's embeddings cut to smaller widths and made unit again, and the same in the teacher's
                width. The total is then the mean over all widths of what it is at one: Matryoshka representation
                learning (Kusupati et al. 2022, arXiv 2205.13147). The masked pictures and the further terms have one
                width and count once.
            extra: Further terms of the sum; they have their own weights, which are neither scheduled nor balanced.
            share: The share of the training's steps that is done, for weights that change.

        Returns:
            The total and its parts, computed in float32 at least whatever the autocast state: at a scale of 100 a
            bfloat16 logit is wrong by up to 0.25.

        Raises:
            MismatchError: If the shapes do not belong together.
        """
        widths = [(student, projected), *narrower]
        for each in widths:
            refuse_mismatch(*each, targets)
        refuse_mismatched_teacher(targets, masked, self.teacher)
        self._hold()
        weights = self.weights.at(share)
        with torch.autocast(student.images.device.type, enabled=False):
            widths = [(own.at_full_precision(), mapped.at_full_precision()) for own, mapped in widths]
            teacher = targets.teacher.as_constants(like=widths[0][0].images)
            total = sum((_nothing(rows) for width in widths for rows in width), torch.zeros(()))
            parts: dict[str, Tensor] = {}
            for place, width in enumerate(widths):
                mark = f"@{width[0].images.shape[1]}" if place else ""
                for term in self._terms(width, teacher, targets, weights):
                    total = total + self._weighted(term, weights) / len(widths)
                    parts[term.name + mark] = _reported(term)
            for term in _masked_terms(masked, teacher.images, weights):
                total = total + self._weighted(term, weights)
                parts[term.name] = _reported(term)
            for further in extra:
                total = total + further.weight * further.value
                parts[further.name] = further.value.detach()
        if self.uncertainty is not None:
            parts |= self.uncertainty.values()
        return LossTerms(total, parts)

    def wants_masked(self, share: float) -> bool:
        """Whether ``forward`` needs the masked pictures at a point of the training."""
        return "masked_feature" in self.weights.at(share)

    def check(self, has_pairs: bool, *, images: bool = True, texts: bool = True) -> None:
        """Refuse data that none of the weighted losses can learn from.

        Args:
            has_pairs: Whether the data hold pictures with texts.
            images: Whether they hold pictures at all.
            texts: Whether they hold texts at all.

        Raises:
            ConfigError: Naming the weights, what they need, and a preset that works.
        """
        unmet = dict(self._unmet_needs(has_pairs, images, texts))
        if unmet and all(name in unmet for name in self.weights.weighted):
            advice = 'these data do not have; loss.preset = "fd" works with unpaired pictures and texts'
            raise ConfigError([f"loss.{name} needs {need}, which {advice}" for name, need in unmet.items()])

    def scale(self) -> float:
        """The student's own inverse temperature, to store with it: learned, fixed by the weights, or the teacher's."""
        if self._fixed_scale is not None:
            return self._fixed_scale
        return min(math.exp(self.logit_scale.item()), MAX_SCALE)

    def bias(self) -> float | None:
        """The student's own SigLIP bias, to store with it; None where its logits have none."""
        if self.weights.siglip:
            return self.logit_bias.item()
        return self.teacher.bias if self._takes_teachers_scale else None

    def _terms(self, width: Width, teacher: Embeddings, targets: Targets, weights: dict[str, float]) -> Iterator[Term]:
        """The terms that are weighted and have rows, in their fixed order."""
        own, mapped = width
        alone = torch.eye(targets.pairs, device=own.images.device).bool()
        positives = targets.positives if self.weights.multi_positive else alone
        queue = None if targets.queue is None else targets.queue.as_constants(like=own.images)
        rows = Rows(own, mapped, teacher, positives, targets.pairs, queue, targets.own_images)
        yield from measure(rows, self.weights, weights, self._scales(), self.fuse)

    def _scales(self) -> Scales:
        vertical = (_CLIP_SCALE, _CLIP_SCALE) if self.vertical_scales is None else self.vertical_scales.exp()
        return Scales(
            student=self.logit_scale.exp() if self._fixed_scale is None else self._fixed_scale,
            bias=self.logit_bias,
            interactive=self.icl_scale.exp(),
            image=vertical[0],
            text=vertical[1],
            teacher=self._speaker,
        )

    def _weighted(self, term: Term, weights: dict[str, float]) -> Tensor:
        loss: Tensor = term.loss if self.uncertainty is None else self.uncertainty(term.weight, term.loss)
        return weights[term.weight] * loss

    def _unmet_needs(self, has_pairs: bool, images: bool, texts: bool) -> Iterator[tuple[str, str]]:
        """The weighted losses that such data cannot feed, each with what it needs."""
        needs = dict.fromkeys(_NEED_PAIRS, (has_pairs, _PAIRS)) | {"masked_feature": (images, "pictures")}
        if self.weights.affinity_rows == "all":
            needs["affinity"] = (images and texts, "both pictures and texts")
        else:
            needs["affinity"] = (has_pairs, f'{_PAIRS} (unless loss.affinity_rows = "all")')
        for name in self.weights.weighted:
            met, need = needs.get(name, (True, ""))
            if not met:
                yield name, need

    @torch.no_grad()
    def _hold(self) -> None:
        # The parameter itself is held, as in CLIP's training. Clamping its use instead would end its gradient at the
        # bound, and a scale that once got there could never come down again.
        for log_scale in (self.logit_scale, self.icl_scale, self.vertical_scales):
            if log_scale is not None and log_scale.requires_grad:
                log_scale.clamp_(max=math.log(MAX_SCALE))
        if self.uncertainty is not None:
            self.uncertainty.hold()


def _parameter(value: float, *, learned: bool) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value), requires_grad=learned)


def _fuse(dim: int | None, teacher_dim: int | None) -> AugmentedFeature:
    if dim is None or teacher_dim is None:
        raise ConfigError(
            "loss.augmented_feature learns maps between the student's and the teacher's embeddings: give the objective "
            f"both widths, Objective(..., dim=..., teacher_dim=...); got {dim} and {teacher_dim}"
        )
    return AugmentedFeature(dim, teacher_dim)


def _nothing(rows: Embeddings) -> Tensor:
    """0, attached to the rows."""
    return 0 * (rows.images.sum() + rows.texts.sum())


def _masked_terms(masked: Tensor | None, teacher: Tensor, weights: dict[str, float]) -> Iterator[Term]:
    """CLIP-KD's MFD (Yang et al. 2024, arXiv 2307.12732), as 1 - cos."""
    if masked is not None and len(masked) and "masked_feature" in weights:
        yield Term("masked_feature", "masked_feature", cosine_loss(full_precision(masked), teacher))


def _reported(term: Term) -> Tensor:
    return (term.loss if term.reported is None else term.reported).detach()
