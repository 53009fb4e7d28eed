"""The classification task in the stages: what it adds to training, how students are chosen, shipped and measured."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clipdistill.cache import AnyCache
from clipdistill.config import RunConfig, TrainConfig
from clipdistill.core.errors import ConfigError
from clipdistill.data.classes import UNKNOWN, Classes
from clipdistill.data.records import Pair, Picture
from clipdistill.evaluation import RetrievalReport
from clipdistill.evaluation.classification import (
    SCHEMA,
    ClassResult,
    Side,
    Verdicts,
    evaluate_classes,
    judge,
    selection_score,
)
from clipdistill.losses.objective import Objective
from clipdistill.retrieval.exact import Vectors
from clipdistill.stages.inputs import RunData
from clipdistill.stages.workspace import Workspace, read_metrics
from clipdistill.towers.classifier import ClassHead, Classifier, class_vectors
from clipdistill.towers.student import DualEncoder
from clipdistill.training.classes import ClassLabels, ClassLoss

_log = logging.getLogger("clipdistill")
_SCALE = "class_scale"
_UNTRAINED_TEXTS = (
    "retrieval by class prompts: no text is trained on (train.batch and train.batch_texts are 0), and the student's "
    "text tower is as it began"
)


@dataclass(frozen=True, slots=True)
class ClassTask:
    """A classification, ready to train.

    Attributes:
        classes: The classes.
        vectors: float32 [classes, D]: the teacher's vector of each.
        loss: What is added to the objective.
        labels: What the batches tell of their pictures.
    """

    classes: Classes
    vectors: Vectors
    loss: ClassLoss
    labels: ClassLabels

    def head(self, scale: float) -> ClassHead:
        """What makes a student a classifier."""
        classes = self.classes
        return ClassHead(classes.labels, classes.names, classes.templates, self.vectors, scale)


def class_task(config: RunConfig, data: RunData, cache: AnyCache) -> ClassTask | None:
    """The classification of a run; None where the task is another.

    Args:
        config: The run's configuration.
        data: Its rows.
        cache: The teacher's embeddings of them, prompts included.
    """
    if data.classes is None:
        return None
    classes, task, vectors = data.classes, config.task, teacher_vectors(data.classes, cache)
    train = data.sets["train"].pairs
    numbers = classes.numbers([pair.label for pair in train])
    return ClassTask(
        classes=classes,
        vectors=vectors,
        loss=ClassLoss(vectors, cache.scale, temperature=task.temperature, distil=task.distil, labels=task.labels),
        labels=ClassLabels({pair.key: int(number) for pair, number in zip(train, numbers, strict=True)}, UNKNOWN),
    )


def teacher_vectors(classes: Classes, cache: AnyCache) -> Vectors:
    """The teacher's vector of each class, from its stored embeddings of the prompts."""
    rows = cache.text_rows(classes.every_prompt)
    return class_vectors(rows.reshape(len(classes), len(classes.templates), -1))


def check_trained(objective: Objective, train: TrainConfig, distil: float, labels: float) -> None:
    """Refuse a classification in which nothing is trained, or texts are embedded for no loss at all.

    Args:
        objective: The losses beside the classification's own.
        train: The loop's settings.
        distil: ``task.distil``.
        labels: ``task.labels``.

    Raises:
        ConfigError: Naming the weights, and what to set.
    """
    if objective.weights.weighted:
        return
    if not (distil or labels):
        raise ConfigError("loss, task: every weight is 0, task.distil and task.labels too, so nothing can be trained")
    if train.batch + train.batch_texts:
        # They would only be pulled to zero by the weight decay.
        raise ConfigError(
            f"loss: every weight is 0, so the texts teach nothing: set train.batch = 0, train.batch_texts = 0 and "
            f"train.batch_images = {train.batch + train.batch_images}, and the text tower stays as it began"
        )


def class_validation(
    task: ClassTask, data: RunData, cache: AnyCache
) -> Callable[[DualEncoder, int], Mapping[str, float]] | None:
    """A function that scores a student on ``val`` by its agreement with the teacher's classes; None without a val set.

    The score is :func:`~clipdistill.evaluation.classification.selection_score`: the share of pictures whose likeliest
    class is the teacher's, and between equal ones the mean divergence of the class probabilities.
    """
    source = data.sets.get("val")
    if source is None or not len(source):
        _log.warning("no validation set (data.val or data.hold_out.val): the last step's student is kept, not the best")
        return None
    teacher = Side(cache.image_rows([pair.key for pair in source.pairs]), cache.scale)
    truth = task.classes.numbers([pair.label for pair in source.pairs])
    pictures = _pictures(source.pairs)

    def on_eval(student: DualEncoder, step: int) -> Mapping[str, float]:
        scale = task.loss.scale.value()
        images = student.to_teacher_vectors(student.encode_images(pictures), "image")
        verdicts = judge(task.vectors, teacher, Side(images, scale))
        return {
            "agreement": float(verdicts.agreement.mean()),
            "top1": float((verdicts.student[:, 0] == truth).mean()),
            "class_divergence": float(verdicts.divergence.mean()),
            _SCALE: scale,
            "score": selection_score(verdicts),
        }

    return on_eval


def save_classifier(workspace: Workspace, task: ClassTask, student: DualEncoder) -> None:
    """Write the classes beside the kept student, with the scale that was learned when that student was scored."""
    scored = [row for row in read_metrics(workspace) if row.get("score") is not None and _SCALE in row]
    kept = max(scored, key=lambda row: row["score"]) if scored else None  # the earliest of equals, as in the loop
    scale = task.loss.scale.value() if kept is None else float(kept[_SCALE])
    Classifier(student, task.head(scale)).save(workspace.student)


def retrieval_rows(config: RunConfig, pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """The rows that retrieval is measured on: of a classification each picture with the first prompt of its class.

    A class with eighty templates would otherwise be asked for eighty times; none where no text is trained on.
    """
    if config.task.kind == "retrieval":
        return pairs
    if not config.train.batch + config.train.batch_texts:
        return ()
    return tuple(dataclasses.replace(pair, captions=pair.captions[:1]) for pair in pairs)


def unmeasured(name: str) -> RetrievalReport:
    """The report of a set on which retrieval is not measured: the protocol says why."""
    return RetrievalReport((), (), ({"set": name, "left_out": [_UNTRAINED_TEXTS]},))


def measure_classification(
    classifier: Classifier, sets: Mapping[str, tuple[Pair, ...]], cache: AnyCache
) -> dict[str, Any]:
    """Measure a classifier and its teacher on some sets.

    Args:
        classifier: The student with its classes.
        sets: The rows by the set's name, each with a label.
        cache: The teacher's embeddings of their pictures.

    Returns:
        Plain values, schema ``clipdistill.classification/1``.
    """
    head = classifier.head
    results = [_measured(name, pairs, classifier, cache) for name, pairs in sets.items()]
    return {
        "schema": SCHEMA,
        "classes": [{"label": label, "name": name} for label, name in zip(head.labels, head.names, strict=True)],
        "templates": list(head.templates),
        "teacher_scale": cache.scale,
        "student_scale": head.scale,
        "sets": [result.to_json() for result in results],
    }


def _measured(name: str, pairs: tuple[Pair, ...], classifier: Classifier, cache: AnyCache) -> ClassResult:
    head = classifier.head
    truth = Classes(head.labels, head.names, head.templates).numbers([pair.label for pair in pairs])
    return evaluate_classes(name, head.labels, head.names, truth, _verdicts(pairs, classifier, cache))


def _verdicts(pairs: tuple[Pair, ...], classifier: Classifier, cache: AnyCache) -> Verdicts:
    images = classifier.embed_in_teacher(classifier.encoder.encode_images(_pictures(pairs)))
    teacher = Side(cache.image_rows([pair.key for pair in pairs]), cache.scale)
    return judge(classifier.head.vectors, teacher, Side(images, classifier.head.scale))


def _pictures(pairs: tuple[Pair, ...]) -> list[Picture]:
    return [pair.picture for pair in pairs if pair.picture is not None]
