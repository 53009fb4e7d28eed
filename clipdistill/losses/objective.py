"""What a student is trained to minimise: the weighted sum of the losses, with every term reported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn

from clipdistill.core.errors import ConfigError, MismatchError, suggest
from clipdistill.losses.affinity import AffinityForm, affinity_loss
from clipdistill.losses.contrastive import clip_loss, siglip_loss
from clipdistill.losses.feature import cosine_loss, mse_loss
from clipdistill.losses.interactive import interactive_loss

AffinityRows = Literal["all", "pairs"]

MAX_SCALE = 100.0  # CLIP's bound on a learned inverse temperature
_CLIP_SCALE = 1 / 0.07
_SIGLIP_SCALE, _SIGLIP_BIAS = 10.0, -10.0
_TERM_WEIGHTS = ("clip", "siglip", "affinity", "feature_cosine", "feature_mse", "interactive")


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
        temperature: T of the affinity loss: divides both sides' logits, and multiplies the loss by its square.
        teacher_scale: The teacher's inverse temperature in the affinity loss; None takes the teacher's own.
        student_scale: The student's inverse temperature, fixed; None learns it.
        affinity_rows: ``all`` compares every image with every text of the batch, paired or not, as the teacher can
            score any two; ``pairs`` keeps to the paired rows, as published. The same where all rows are paired.
        affinity_form: ``kl`` or ``cross_entropy``: equal gradients, different values.
        multi_positive: Whether a text that describes several images of the batch is a positive of each; otherwise
            only its own row is.

    Raises:
        ConfigError: Naming every value that is out of its range.
    """

    clip: float = 0.0
    siglip: float = 0.0
    affinity: float = 0.0
    feature_cosine: float = 0.0
    feature_mse: float = 0.0
    interactive: float = 0.0
    temperature: float = 1.0
    teacher_scale: float | None = None
    student_scale: float | None = None
    affinity_rows: AffinityRows = "all"
    affinity_form: AffinityForm = "kl"
    multi_positive: bool = True

    def __post_init__(self) -> None:
        faults = [
            f"loss.{name} must be a finite number, 0 or more; got {getattr(self, name)}"
            for name in _TERM_WEIGHTS
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0)
        ]
        faults += [
            f"loss.{name} must be a finite number above 0; got {getattr(self, name)}"
            for name in ("temperature", "teacher_scale", "student_scale")
            if getattr(self, name) is not None and not _is_scale(getattr(self, name))
        ]
        for name, choices in (("affinity_rows", get_args(AffinityRows)), ("affinity_form", get_args(AffinityForm))):
            if getattr(self, name) not in choices:
                faults.append(
                    f"loss.{name} = {getattr(self, name)!r} is unknown; {suggest(getattr(self, name), choices)}"
                )
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One batch's embeddings of one side.

    Attributes:
        images: Unit rows [images, dim].
        texts: Unit rows [texts, dim].
    """

    images: Tensor
    texts: Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher and the data say about one batch.

    Attributes:
        teacher: Unit rows [images, D] and [texts, D], in the order of the student's.
        positives: bool [pairs, pairs]; [i, j] where text j describes image i, the diagonal always.
        pairs: The first so many images and texts are paired, row by row; the others are unpaired. May be 0.
    """

    teacher: Embeddings
    positives: Tensor
    pairs: int


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
class TeacherScale:
    """How the teacher turns cosines into logits.

    Attributes:
        scale: Its inverse temperature (the exponential of ``logit_scale``).
        bias: Its SigLIP bias, or None.

    Raises:
        ConfigError: If the scale is not a finite number above 0, or the bias not finite.
    """

    scale: float
    bias: float | None

    def __post_init__(self) -> None:
        faults = []
        if not _is_scale(self.scale):
            faults.append(f"the teacher's logit scale must be a finite number above 0; got {self.scale}")
        if self.bias is not None and not math.isfinite(self.bias):
            faults.append(f"the teacher's logit bias must be finite; got {self.bias}")
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """One batch's losses.

    Attributes:
        total: The weighted sum, to call ``backward`` on; always attached to the student's embeddings, even where no
            term applies and it is 0.
        parts: Each term of the objective that has rows in this batch, unweighted and detached, in the order ``clip,
            siglip, affinity, feature_image, feature_text, interactive``. The two feature terms are always reported as
            1 - cos, whichever form is trained, so that runs compare over forms and widths.
    """

    total: Tensor
    parts: dict[str, Tensor]


@final
class Objective(nn.Module):
    """The weighted sum of the losses, and the numbers that are learned with the student: its scales and its bias.

    ``logit_scale`` and ``icl_scale`` hold logarithms; they start at ln(1/0.07) (``logit_scale`` at ln 10 with the
    SigLIP loss, and ``logit_bias`` at -10) and are held at ln 100 or below. All three are always in the state dict;
    only those that the weights train ask for a gradient.

    Args:
        weights: How much each loss counts.
        teacher: How the teacher turns cosines into logits.

    Raises:
        ConfigError: If every weight is 0.
    """

    def __init__(self, weights: LossWeights, teacher: TeacherScale) -> None:
        super().__init__()
        if not any(getattr(weights, name) for name in _TERM_WEIGHTS):
            raise ConfigError('loss: every weight is 0, so nothing can be trained; set one, or loss.preset = "default"')
        self.weights = weights
        self.teacher = teacher
        # With no loss on the student's own logits its scale cannot be learned. It imitates the teacher's vectors then,
        # so the teacher's scale is the one to ship it with.
        self._takes_teachers_scale = (
            not (weights.clip or weights.siglip or weights.affinity) and weights.student_scale is None
        )
        self._fixed_scale = teacher.scale if self._takes_teachers_scale else weights.student_scale
        start = self._fixed_scale or (_SIGLIP_SCALE if weights.siglip else _CLIP_SCALE)
        self.logit_scale = _parameter(math.log(start), learned=self._fixed_scale is None)
        self.logit_bias = _parameter(_SIGLIP_BIAS, learned=weights.siglip > 0)
        self.icl_scale = _parameter(math.log(_CLIP_SCALE), learned=weights.interactive > 0)

    def forward(
        self, student: Embeddings, projected: Embeddings, targets: Targets, *, extra: Sequence[ExtraTerm] = ()
    ) -> LossTerms:
        """Measure one batch.

        Args:
            student: The student's own unit embeddings [images, d] and [texts, d].
            projected: The same in the teacher's width [images, D] and [texts, D]; the same object where d = D.
            targets: The teacher's embeddings, and which texts describe which images.
            extra: Further terms of the sum.

        Returns:
            The total and its parts, computed in float32 at least whatever the autocast state: at a scale of 100 a
            bfloat16 logit is wrong by up to 0.25.

        Raises:
            MismatchError: If the shapes do not belong together.
        """
        _refuse_mismatch(student, projected, targets)
        self._hold_scales()
        with torch.autocast(student.images.device.type, enabled=False):
            student, projected = _at_full_precision(student), _at_full_precision(projected)
            teacher = _as_constants(targets.teacher, like=student.images)
            total = 0 * (student.images.sum() + student.texts.sum() + projected.images.sum() + projected.texts.sum())
            parts: dict[str, Tensor] = {}
            further = (_weighted(term.name, term.weight, term.value) for term in extra)
            for name, weighted, reported in chain(self._terms(student, projected, teacher, targets), further):
                total = total + weighted
                parts[name] = reported.detach()
        return LossTerms(total, parts)

    def check(self, has_pairs: bool, *, images: bool = True, texts: bool = True) -> None:
        """Refuse data that none of the weighted losses can learn from.

        Args:
            has_pairs: Whether the data hold pictures with texts.
            images: Whether they hold pictures at all.
            texts: Whether they hold texts at all.

        Raises:
            ConfigError: Naming the weights, what they need, and a preset that works.
        """
        unmet = dict(self._unmet_needs(has_pairs, images and texts))
        weighted = [name for name in _TERM_WEIGHTS if getattr(self.weights, name)]
        if all(name in unmet for name in weighted):
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

    def _terms(
        self, student: Embeddings, projected: Embeddings, teacher: Embeddings, targets: Targets
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The terms that are weighted and have rows, in their fixed order: name, weighted value, reported value."""
        weights, pairs = self.weights, targets.pairs
        own, theirs = _first(student, pairs), _first(teacher, pairs)
        positives = targets.positives if weights.multi_positive else torch.eye(pairs, device=own.images.device).bool()
        scale = self.logit_scale.exp() if self._fixed_scale is None else self._fixed_scale
        if weights.clip and pairs:
            yield _weighted("clip", weights.clip, clip_loss(own.images, own.texts, scale, positives))
        if weights.siglip and pairs:
            loss = siglip_loss(own.images, own.texts, scale, self.logit_bias, positives)
            yield _weighted("siglip", weights.siglip, loss)
        if weights.affinity_rows == "all":
            yield from self._affinity_terms(student, teacher, scale)
        else:
            yield from self._affinity_terms(own, theirs, scale)
        yield from self._feature_terms("feature_image", projected.images, teacher.images)
        yield from self._feature_terms("feature_text", projected.texts, teacher.texts)
        if weights.interactive and pairs:
            anchored = _first(projected, pairs)
            loss = interactive_loss(
                anchored.images, anchored.texts, theirs.images, theirs.texts, self.icl_scale.exp(), positives
            )
            yield _weighted("interactive", weights.interactive, loss)

    def _affinity_terms(
        self, student: Embeddings, teacher: Embeddings, scale: Tensor | float
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        weights = self.weights
        if not (weights.affinity and len(student.images) and len(student.texts)):
            return
        loss = affinity_loss(
            student.images,
            student.texts,
            teacher.images,
            teacher.texts,
            scale,
            weights.teacher_scale or self.teacher.scale,
            weights.temperature,
            weights.affinity_form,
        )
        yield _weighted("affinity", weights.affinity, loss)

    def _feature_terms(self, name: str, student: Tensor, teacher: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        weights = self.weights
        if not (weights.feature_cosine or weights.feature_mse) or not len(student):
            return
        cosine = cosine_loss(student, teacher)
        weighted = weights.feature_cosine * cosine
        if weights.feature_mse:
            weighted = weighted + weights.feature_mse * mse_loss(student, teacher)
        yield name, weighted, cosine

    def _unmet_needs(self, has_pairs: bool, both: bool) -> Iterator[tuple[str, str]]:
        """The weighted losses that such data cannot feed, each with what it needs."""
        needs = dict.fromkeys(("clip", "siglip", "interactive"), (has_pairs, "pictures paired with texts"))
        if self.weights.affinity_rows == "all":
            needs["affinity"] = (both, "both pictures and texts")
        else:
            needs["affinity"] = (has_pairs, 'pictures paired with texts (unless loss.affinity_rows = "all")')
        for name in _TERM_WEIGHTS:
            met, need = needs.get(name, (True, ""))
            if getattr(self.weights, name) and not met:
                yield name, need

    @torch.no_grad()
    def _hold_scales(self) -> None:
        # The parameter itself is held, as in CLIP's training. Clamping its use instead would end its gradient at the
        # bound, and a scale that once got there could never come down again.
        for log_scale in (self.logit_scale, self.icl_scale):
            if log_scale.requires_grad:
                log_scale.clamp_(max=math.log(MAX_SCALE))


def _is_scale(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _parameter(value: float, *, learned: bool) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value), requires_grad=learned)


def _weighted(name: str, weight: float, loss: Tensor) -> tuple[str, Tensor, Tensor]:
    return name, weight * loss, loss


def _first(rows: Embeddings, count: int) -> Embeddings:
    return Embeddings(rows.images[:count], rows.texts[:count])


def _at_full_precision(rows: Embeddings) -> Embeddings:
    return Embeddings(*(side if side.dtype == torch.float64 else side.float() for side in (rows.images, rows.texts)))


def _as_constants(rows: Embeddings, like: Tensor) -> Embeddings:
    return Embeddings(rows.images.detach().to(like), rows.texts.detach().to(like))


def _refuse_mismatch(student: Embeddings, projected: Embeddings, targets: Targets) -> None:
    """Raise MismatchError where shapes disagree: broadcasting would turn some of these faults into a plausible loss."""
    teacher, pairs = targets.teacher, targets.pairs
    rows = (len(teacher.images), len(teacher.texts))
    shared = min(*rows, len(student.images), len(student.texts))
    facts = (
        ("the student's images and texts", rows, (len(student.images), len(student.texts))),
        ("the shape of the projected images", tuple(teacher.images.shape), tuple(projected.images.shape)),
        ("the shape of the projected texts", tuple(teacher.texts.shape), tuple(projected.texts.shape)),
        ("the shape of positives", (pairs, pairs), tuple(targets.positives.shape)),
        ("the number of pairs", min(max(pairs, 0), shared), pairs),
    )
    for field, expected, found in facts:
        if expected != found:
            remedy = "The teacher's rows, the student's rows and the pairs of a batch come from the same samples."
            raise MismatchError("the batch", field, expected, found, remedy)
