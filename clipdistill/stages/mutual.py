"""What mutual training made of the teacher: its checkpoint, and both sides before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clipdistill.cache import AnyCache
from clipdistill.config import RunConfig, evaluation_sets
from clipdistill.core import files, fingerprint
from clipdistill.data.records import Pair
from clipdistill.evaluation import Embedded, RetrievalReport, evaluate_embedded, judged
from clipdistill.stages.inputs import RunData
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.teacher import Teacher
from clipdistill.towers.teacher_folder import load_saved
from clipdistill.training.mutual import Mutual

_K = 10


def new_mutual(config: RunConfig, teachers: Sequence[Teacher | None]) -> Mutual | None:
    """The one teacher's side of mutual training, trained in place; None in the other modes."""
    (teacher, *_) = teachers
    return None if config.train.mode != "mutual" or teacher is None else Mutual(teacher, config.mutual)


def mutual_inputs(config: RunConfig) -> dict[str, Any]:
    """What decides a mutual training beside the rest; empty in the other modes."""
    if config.train.mode != "mutual":
        return {}
    return {"mutual": fingerprint.of_value(config.mutual.model_dump(mode="json"))}


def trained_teacher(workspace: Workspace) -> dict[str, Any]:
    """The fingerprint of the teacher that mutual training left; empty in the other modes."""
    if workspace.config.train.mode != "mutual":
        return {}
    return {"mutual teacher": fingerprint.of_value(files.read_json(workspace.mutual / "manifest.json")["files"])}


def mutual_report(workspace: Workspace, data: RunData, cache: AnyCache, evaluation: RetrievalReport) -> dict[str, Any]:
    """Measure the trained teacher on the evaluation sets, against the truth and against itself before.

    Args:
        workspace: The run.
        data: Its rows.
        cache: The embeddings of the teacher as it was.
        evaluation: The student's figures.

    Returns:
        ``k``, what it was trained with, by set the success@k from texts to pictures of the teacher ``before`` and
        ``after`` and of the ``student``, the ratio after / before (``kept``), each a value with its interval, and the
        ``verdict`` in words. Sets without ground truth are left out.
    """
    config = workspace.config
    after = load_saved(workspace.mutual, device=config.teacher.device, max_pixels=config.data.max_pixels)
    sets = {}
    for name in evaluation_sets(config):
        found = _measured(name, data.sets[name].pairs, after, cache)
        if found:
            sets[name] = {**found, "student": _value(evaluation, name, "student", "success")}
    settings = config.mutual.model_dump(mode="json")
    return {"k": _K, **settings, "sets": sets, "verdict": verdict(sets), "folder": workspace.mutual.name}


def verdict(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """What became of the teacher, a sentence a set, and what a single run cannot say of the student.

    Args:
        sets: By name, ``before``, ``after``, ``kept`` and ``student`` as :func:`mutual_report` gives them.
    """
    sentences = [_sentence(name, found) for name, found in sets.items()] or ["No set has a ground truth to measure by."]
    rest = (
        'Whether the student gained by it takes the same run with train.mode = "cached" beside it: '
        "benchmarks/mutual.py makes that comparison over several seeds."
    )
    return " ".join([*sentences, rest])


def _sentence(name: str, found: Mapping[str, Any]) -> str:
    before, after, kept = found["before"]["value"], found["after"]["value"], found["kept"]
    word = "did not change the teacher's beyond chance"
    if kept["low"] is not None and kept["low"] > 1:
        word = "improved the teacher's"
    elif kept["high"] is not None and kept["high"] < 1:
        word = "worsened the teacher's"
    student = found["student"]["value"]
    theirs = "" if student is None else f" The student reaches {student:.3f}."
    return f"On {name}, mutual training {word} success@{_K}: {before:.3f} before, {after:.3f} after.{theirs}"


def _measured(name: str, pairs: tuple[Pair, ...], after: Teacher, cache: AnyCache) -> dict[str, Any] | None:
    rows = judged(name, pairs)
    if not any(rows.relevant_pictures):
        return None
    was = Embedded(cache.image_rows(rows.keys), cache.text_rows(rows.texts), cache.fingerprint)
    now = Embedded(after.encode_images(rows.pictures), after.encode_texts(rows.texts), after.fingerprint)
    report = evaluate_embedded(rows, now, teacher=was, factory=None, ks=(_K,), seed=0)
    return {
        "before": _value(report, name, "teacher", "success"),
        "after": _value(report, name, "student", "success"),
        "kept": _value(report, name, "student", "retention"),
    }


def _value(report: RetrievalReport, name: str, pairing: str, measure: str) -> dict[str, float | None]:
    """A figure with its interval; nulls where it was not measured at that cut-off."""
    for row in report.rows:
        where = (row.set, row.direction, row.pairing, row.search, row.measure, row.k)
        if where == (name, "text_to_image", pairing, "exact", measure, _K):
            return {"value": row.value, "low": row.low, "high": row.high}
    return {"value": None, "low": None, "high": None}
