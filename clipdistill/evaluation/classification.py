"""Measuring a classification: accuracy of teacher and student, their agreement, their calibration, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdistill.core.errors import DataError
from clipdistill.retrieval.exact import Ids, Vectors
from clipdistill.retrieval.measures import Values, bootstrap_interval, paired_bootstrap, retention

SCHEMA = "clipdistill.classification/1"
BINS = 15
"""Of the calibration error: equally wide ones, as in Guo et al. 2017."""
TOP = 5
_BLOCK = 1 << 22  # class probabilities held at once


@dataclass(frozen=True)
class Side:
    """One model's way from pictures to class probabilities: ``softmax(scale * images @ classes.T)``.

    Attributes:
        images: Unit rows [pictures, D], in the space of the classes.
        scale: What the cosines are multiplied with.
    """

    images: Vectors
    scale: float


@dataclass(frozen=True)
class Verdicts:
    """What teacher and student say of each picture.

    Attributes:
        teacher: int64 [pictures, up to 5]: its likeliest classes, best first, equal ones in the classes' order.
        student: The student's.
        teacher_confidence: float64 [pictures]: the probability of its likeliest class.
        student_confidence: The student's.
        divergence: float64 [pictures]: KL(teacher || student) of the class probabilities, in nats.
    """

    teacher: Ids
    student: Ids
    teacher_confidence: Values
    student_confidence: Values
    divergence: Values

    @property
    def agreement(self) -> Values:
        """1 where both have the same likeliest class, else 0."""
        return np.asarray(self.teacher[:, 0] == self.student[:, 0], np.float64)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value with its 95% bootstrap interval over the pictures; all None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin of the reliability diagram.

    Attributes:
        pictures: How many have their likeliest class's probability in it.
        confidence: The mean of those; None of none.
        accuracy: The share of them that is right; None of none.
    """

    pictures: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well one model classifies a set.

    Attributes:
        top1: The share of pictures whose likeliest class is the label.
        top5: The share whose label is among the five likeliest; None with five classes or fewer, where it is always 1.
        ece: The expected calibration error, in 15 bins.
        bins: Those bins, from the lowest probability up.
    """

    top1: Estimate
    top5: Estimate
    ece: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class ClassLine:
    """One class of a set.

    Attributes:
        label: As the data name it.
        name: As it is read.
        pictures: How many the set has of it.
        teacher: The share of them that the teacher classifies right.
        student: The share that the student does.
        agreement: The share on which both have the same likeliest class.
    """

    label: str
    name: str
    pictures: int
    teacher: float
    student: float
    agreement: float


@dataclass(frozen=True, slots=True)
class ClassResult:
    """What was measured on one set.

    Attributes:
        set: Its name.
        pictures: How many pictures.
        classes: How many classes there are to choose from.
        teacher: The teacher's accuracy and calibration.
        student: The student's.
        agreement: The share of pictures with the same likeliest class in both, right or wrong.
        retention: The student's top-1 divided by the teacher's, its interval a paired bootstrap's.
        divergence: The mean KL(teacher || student) of the class probabilities, in nats.
        per_class: The classes that have pictures here.
    """

    set: str
    pictures: int
    classes: int
    teacher: Accuracy
    student: Accuracy
    agreement: Estimate
    retention: Estimate
    divergence: float
    per_class: tuple[ClassLine, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they come back from JSON."""
        value = asdict(self)
        value["per_class"] = list(value["per_class"])
        for who in ("teacher", "student"):
            value[who]["bins"] = list(value[who]["bins"])
        return value


def judge(classes: Vectors, teacher: Side, student: Side) -> Verdicts:
    """Classify pictures with both models, a block of pictures at a time.

    Args:
        classes: Unit rows [classes, D].
        teacher: The teacher's pictures.
        student: The student's, in the same space and order.
    """
    parts = list(_judged(classes, teacher, student))
    return Verdicts(*(np.concatenate([part[place] for part in parts]) for place in range(5)))


def evaluate_classes(
    name: str,
    labels: Sequence[str],
    names: Sequence[str],
    truth: npt.NDArray[np.int64],
    verdicts: Verdicts,
    *,
    seed: int = 0,
) -> ClassResult:
    """Measure both models on one set.

    Args:
        name: The set's name.
        labels: The classes.
        names: The same as they are read.
        truth: int64 [pictures], the number of each one's class.
        verdicts: What both say of them.
        seed: Of the bootstrap.

    Raises:
        DataError: If there are no pictures, or one without a class.
    """
    if not len(truth) or truth.min() < 0:
        raise DataError(f"{name}: pictures with a class are needed to measure a classification on")
    right = {who: (ids[:, 0] == truth).astype(np.float64) for who, ids in _both(verdicts)}
    low, high = paired_bootstrap(right["student"], right["teacher"], seed=seed)
    return ClassResult(
        set=name,
        pictures=len(truth),
        classes=len(labels),
        teacher=_accuracy(verdicts.teacher, verdicts.teacher_confidence, truth, len(labels), seed),
        student=_accuracy(verdicts.student, verdicts.student_confidence, truth, len(labels), seed),
        agreement=_estimate(verdicts.agreement, seed),
        retention=Estimate(*map(_defined, (retention(right["student"], right["teacher"]), low, high))),
        divergence=float(verdicts.divergence.mean()),
        per_class=tuple(_lines(labels, names, truth, right["teacher"], right["student"], verdicts.agreement)),
    )


def reliability(confidence: Values, right: Values, bins: int = BINS) -> tuple[Bin, ...]:
    """The reliability diagram: pictures by the probability of their likeliest class, in bins ((m-1)/M, m/M].

    Args:
        confidence: float64 [pictures], each in 0 to 1.
        right: 1 where that class is the label, else 0.
        bins: M.
    """
    places = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    sums = [np.bincount(places, weights=values, minlength=bins) for values in (confidence, right)]
    return tuple(
        Bin(int(count), *((float(part[place] / count) if count else None) for part in sums))
        for place, count in enumerate(counts)
    )


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error: sum over bins of n_m / n |accuracy_m - confidence_m|; 0 is perfect.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, eq. 3.
    """
    total = sum(one.pictures for one in bins)
    gaps = (one.pictures * abs((one.accuracy or 0.0) - (one.confidence or 0.0)) for one in bins)
    return float(sum(gaps) / total) if total else 0.0


def selection_score(verdicts: Verdicts) -> float:
    """What chooses between students on the validation set, higher is better: agreement first, then divergence.

    ``a - d / ((1 + d) (n + 1))``, a the share of the n pictures on which both models have the same likeliest class and
    d the mean KL(teacher || student). The second part is always less than one picture's share, so it decides only
    between students that agree equally often. 1 for a student with the teacher's own probabilities.
    """
    divergence, pictures = max(0.0, float(verdicts.divergence.mean())), len(verdicts.divergence)
    return float(verdicts.agreement.mean()) - divergence / ((1 + divergence) * (pictures + 1))


def _judged(classes: Vectors, teacher: Side, student: Side) -> Iterator[tuple[Ids, Ids, Values, Values, Values]]:
    rows = max(1, _BLOCK // len(classes))
    for start in range(0, max(1, len(teacher.images)), rows):
        logs = [_log_probabilities(side, classes, slice(start, start + rows)) for side in (teacher, student)]
        top = [np.argsort(-part, axis=1, kind="stable")[:, :TOP] for part in logs]
        divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1)
        yield *top, *(np.exp(part.max(axis=1)) for part in logs), divergence


def _log_probabilities(side: Side, classes: Vectors, rows: slice) -> Values:
    logits = side.scale * (side.images[rows] @ classes.T).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _both(verdicts: Verdicts) -> tuple[tuple[str, Ids], tuple[str, Ids]]:
    return ("teacher", verdicts.teacher), ("student", verdicts.student)


def _accuracy(top: Ids, confidence: Values, truth: npt.NDArray[np.int64], classes: int, seed: int) -> Accuracy:
    right = np.asarray(top[:, 0] == truth, np.float64)
    among = np.asarray((top == truth[:, None]).any(axis=1), np.float64)
    bins = reliability(confidence, right)
    return Accuracy(
        top1=_estimate(right, seed),
        top5=_estimate(among, seed) if classes > TOP else Estimate(None, None, None),
        ece=calibration_error(bins),
        bins=bins,
    )


def _estimate(values: Values, seed: int) -> Estimate:
    return Estimate(float(values.mean()), *bootstrap_interval(values, seed=seed))


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _lines(
    labels: Sequence[str],
    names: Sequence[str],
    truth: npt.NDArray[np.int64],
    teacher: Values,
    student: Values,
    agreement: Values,
) -> Iterator[ClassLine]:
    counts = np.bincount(truth, minlength=len(labels))
    sums = [np.bincount(truth, weights=part, minlength=len(labels)) for part in (teacher, student, agreement)]
    for number, count in enumerate(counts):
        if count:
            yield ClassLine(labels[number], names[number], int(count), *(float(part[number] / count) for part in sums))
