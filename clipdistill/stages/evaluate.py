"""The evaluation stage: the student against the ground truth and against the teacher's own rankings."""

from __future__ import annotations

import logging
from typing import Any

from clipdistill.cache import AnyCache, EnsembleCache
from clipdistill.config import RunConfig, evaluation_sets
from clipdistill.core import files, fingerprint, manifest
from clipdistill.core.errors import ConfigError
from clipdistill.data.records import Pair
from clipdistill.evaluation import Embedded, RetrievalReport, evaluate_embedded, evaluate_query_side, judged
from clipdistill.search import QuerySide
from clipdistill.speed import compare_speed
from clipdistill.stages.classify import measure_classification, retrieval_rows, unmeasured
from clipdistill.stages.index import indexed_pairs
from clipdistill.stages.inputs import RunData
from clipdistill.stages.members import measure_members
from clipdistill.stages.mutual import mutual_report, trained_teacher
from clipdistill.stages.query import TEXT_TOWER, savings
from clipdistill.stages.teachers import WholeTeacher
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.classifier import Classifier
from clipdistill.towers.matryoshka import cut_vectors
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.teacher import Teacher
from clipdistill.training.folder import PLAN

SCHEMA = "clipdistill.run-report/1"
_log = logging.getLogger("clipdistill")
_TIMED_PICTURES, _TIMED_TEXTS = 64, 512


def evaluate_set(
    name: str, pairs: tuple[Pair, ...], student: DualEncoder, cache: AnyCache, *, factory: str, ks: tuple[int, ...]
) -> RetrievalReport:
    """Measure a student on one set, exactly and through an index, against the truth and the teacher's cached rows.

    Args:
        name: The set's name.
        pairs: Its rows.
        student: The student.
        cache: The teacher's embeddings of the same rows.
        factory: The FAISS factory to measure through.
        ks: The cut-offs.
    """
    rows = judged(name, pairs)
    teacher = Embedded(cache.image_rows(rows.keys), cache.text_rows(rows.texts), cache.fingerprint)
    if student.searches is not None:
        texts = QuerySide(student).encode_texts(rows.texts)
        return evaluate_query_side(rows, texts, student.fingerprint, teacher=teacher, factory=factory, ks=ks, seed=0)
    own = Embedded(student.encode_images(rows.pictures), student.encode_texts(rows.texts), student.fingerprint)
    narrower = {dim: _with_projected(student, _cut(own, dim)) for dim in student.dims[1:]}
    return evaluate_embedded(
        rows,
        own,
        teacher=teacher,
        student_in_teacher=_with_projected(student, own)[1],
        narrower=narrower,
        factory=factory,
        ks=ks,
        seed=0,
    )


def _cut(embedded: Embedded, dim: int) -> Embedded:
    return Embedded(cut_vectors(embedded.images, dim), cut_vectors(embedded.texts, dim), embedded.fingerprint)


def _with_projected(student: DualEncoder, own: Embedded) -> tuple[Embedded, Embedded | None]:
    """A student's embeddings, and the same in the teacher's space; None where they are in it already."""
    if student.projection is None:
        return own, None
    images, texts = student.to_teacher_vectors(own.images, "image"), student.to_teacher_vectors(own.texts, "text")
    return own, Embedded(images, texts, own.fingerprint)


def evaluate(
    workspace: Workspace,
    data: RunData,
    cache: AnyCache,
    student: DualEncoder,
    teacher: WholeTeacher | None,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Measure the student on every evaluation set and write ``report.json``.

    Returns:
        The report as plain values: schema ``clipdistill.run-report/1``.
    """
    config = workspace.config
    classifier = None if data.classes is None else Classifier.load(workspace.student)
    made_from = {
        "student": student.fingerprint,
        "teacher cache": cache.fingerprint,
        "data": data.fingerprint,
        "evaluate": fingerprint.of_value([config.evaluate.model_dump(mode="json"), config.index.factory]),
        **({} if classifier is None else {"classifier": classifier.fingerprint}),
        **trained_teacher(workspace),
    }
    if workspace.is_done("evaluate", made_from, workspace.report_json, force=force):
        return dict(files.read_json(workspace.report_json))
    sets: dict[str, tuple[Pair, ...]] = {}
    for name in evaluation_sets(config):
        if name not in data.sets or not len(data.sets[name]):
            raise ConfigError(f"evaluate.sets: the set {name!r} has no rows; give data.test or data.hold_out.test")
        sets[name] = data.sets[name].pairs
    reports = [_retrieval(config, name, pairs, student, cache) for name, pairs in sets.items()]
    evaluation = RetrievalReport.merge(reports)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "name": config.name,
        "seed": config.seed,
        "data": _counts(data),
        "sizes": _sizes(student, teacher, cache),
        "speeds": _speeds(data, student, teacher),
        "evaluation": evaluation.to_json(),
        **({} if classifier is None else {"classification": measure_classification(classifier, sets, cache)}),
        "student_fingerprint": student.fingerprint,
        "libraries": manifest.libraries(),
    }
    searched = {name: rows for name, pairs in sets.items() if (rows := retrieval_rows(config, pairs))}
    if isinstance(cache, EnsembleCache) and searched:
        report["members"] = measure_members(cache, searched, teacher, ks=config.evaluate.ks)
    if student.searches is not None:
        report["saves"] = savings(len(indexed_pairs(workspace, data)), report["sizes"], report["speeds"])
    if config.train.budget_minutes is not None and (workspace.training / PLAN).exists():
        report["budget"] = _budget(workspace)
    if config.train.mode == "mutual":
        report["mutual"] = mutual_report(workspace, data, cache, evaluation)
    files.write_json(workspace.report_json, report)
    workspace.mark_done("evaluate", made_from)
    return report


def _retrieval(
    config: RunConfig, name: str, pairs: tuple[Pair, ...], student: DualEncoder, cache: AnyCache
) -> RetrievalReport:
    _log.info("evaluating %s", name)
    rows = retrieval_rows(config, pairs)
    if not rows:
        return unmeasured(name)
    return evaluate_set(name, rows, student, cache, factory=config.index.factory, ks=config.evaluate.ks)


def _budget(workspace: Workspace) -> dict[str, Any]:
    """What the training was given, what was planned for it, and what it took, in minutes; and the steps."""
    plan = files.read_json(workspace.training / PLAN)
    minutes = {name: plan[f"{name}_seconds"] / 60 for name in ("planned", "taken")}
    return {
        "budget_minutes": plan["budget_minutes"],
        "steps": plan["steps"],
        **{f"{k}_minutes": v for k, v in minutes.items()},
    }


def _counts(data: RunData) -> dict[str, Any]:
    sets = {
        name: {"pictures": len(source), "texts": len({text for pair in source.pairs for text in pair.captions})}
        for name, source in data.sets.items()
    }
    rest = {"images": len(data.images), "texts": len(data.texts), "rejected": len(data.rejected), "unused": data.unused}
    return {"sets": sets, **rest}


def _sizes(student: DualEncoder, teacher: WholeTeacher | None, cache: AnyCache) -> dict[str, Any]:
    """Parameters, megabytes and widths; where the student is a text tower alone, of the teacher's text tower too."""
    known = {"name": cache.facts["teacher"]["name"], "dim": cache.dim}
    small = {"parameters": student.parameters, "megabytes": student.parameters * 4 / 1e6, "dim": student.dim}
    if teacher is None:
        return {"teacher": known, "student": small, **_part(student)}
    counted = teacher.parameters
    large: dict[str, float] = {}
    if student.searches is not None and isinstance(teacher, Teacher):  # an ensemble has no index of one space
        large = {"picture_parameters": teacher.picture_parameters}
        counted -= teacher.picture_parameters
    large |= {"parameters": counted, "megabytes": counted * 4 / 1e6}
    return {"teacher": {**known, **large}, "student": small, **_part(student)}


def _part(student: DualEncoder) -> dict[str, str]:
    """What the sizes are of, where it is not the whole models."""
    return {} if student.searches is None else {"part": TEXT_TOWER}


def _speeds(data: RunData, student: DualEncoder, teacher: WholeTeacher | None) -> dict[str, Any]:
    """Rates on the run's own pictures and texts; the teacher's only where it is live."""
    pairs = next((source.pairs for source in reversed(list(data.sets.values())) if len(source)), ())
    pictures = [pair.picture for pair in pairs[:_TIMED_PICTURES] if pair.picture is not None]
    texts = list(dict.fromkeys(text for pair in pairs for text in pair.captions))[:_TIMED_TEXTS]
    encoders: dict[str, Any] = {"teacher": teacher, "student": student} if teacher else {"student": student}
    rates = compare_speed(encoders, pictures if student.searches is None else (), texts)
    values: dict[str, Any] = {
        name: {"images_per_s": speed.images_per_s, "texts_per_s": speed.texts_per_s} for name, speed in rates.items()
    }
    if student.searches is not None:  # pictures are the teacher's alone
        values["student"]["images_per_s"] = None
        if teacher is not None:
            values["teacher"]["images_per_s"] = compare_speed({"teacher": teacher}, pictures, ())[
                "teacher"
            ].images_per_s
    return {**values, "pictures": len(pictures), "texts": len(texts), "runtime": "PyTorch, eager, end to end"}
