"""The inspection: what the data hold, and what the run will cost, before anything expensive runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from clipdistill.cache.fill import planned_bytes
from clipdistill.data.records import Picture
from clipdistill.data.survey import survey
from clipdistill.stages.blocks import check_blocks, preview
from clipdistill.stages.coverage import coverage, readable
from clipdistill.stages.inputs import RunData
from clipdistill.stages.teachers import TeacherPart, first_teacher, open_teachers, teacher_parts
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.teacher import Teacher

_SAMPLE_PICTURES, _SAMPLE_TEXTS = 16, 64


def inspect(workspace: Workspace, data: RunData) -> dict[str, Any]:
    """Survey every set of a run and estimate the teacher's work from a short measurement.

    Args:
        workspace: The run.
        data: Its rows, loaded without a limit to the refused ones: an inspection is there to show them.

    Returns:
        ``sets``: a survey by set name; ``unpaired``: counts; ``unused``: rows of ``train`` that ``data.fraction``
        leaves out; ``cost``: passes, bytes and estimated seconds; ``coverage``: how well ``train`` covers other sets.
    """
    teachers = open_teachers(workspace.config)
    check_blocks(workspace.config, first_teacher(teachers))
    sets = {name: survey(source).to_json() for name, source in data.sets.items()}
    extra = {"images": len(data.images), "texts": len(data.texts)}
    price = cost(workspace, data, teachers)
    covered = coverage(workspace, data, teachers, price.get("pictures_per_s", 0.0), price.get("texts_per_s", 0.0))
    return {"sets": sets, "unpaired": extra, "unused": data.unused, "cost": price, "coverage": covered}


def cost(workspace: Workspace, data: RunData, teachers: Sequence[Teacher | None]) -> dict[str, Any]:
    """What caching the teacher will take: passes, bytes, and seconds at the rate measured now on a few rows.

    An ensemble's cost is the sum of its ``members``', each given as for one teacher.
    """
    texts = list(dict.fromkeys([*(text for pair in data.pairs for text in pair.captions), *data.texts]))
    pictures = [pair.picture for pair in data.pairs if pair.picture is not None]
    costs = [_cost(workspace, part, pictures, texts) for part in teacher_parts(workspace, teachers)]
    whole = costs[0] if len(costs) == 1 else _sum(costs)
    rates = (whole.get("pictures_per_s", 0.0), whole.get("texts_per_s", 0.0))
    return {**whole, "blocks": preview(workspace.config, data, first_teacher(teachers), *rates)}


def _cost(workspace: Workspace, part: TeacherPart, pictures: list[Picture], texts: list[str]) -> dict[str, Any]:
    teacher, config = part.teacher, workspace.config.cache
    if teacher is None:
        return {"teacher": part.config.embeddings, "picture_passes": 0, "text_passes": 0, "cache_bytes": 0}
    passes = {"picture_passes": len(pictures) * config.views, "text_passes": len(texts)}
    measured = _rates(teacher, pictures, texts, part.batch)
    seconds = _at(passes["picture_passes"], measured["pictures_per_s"])
    seconds += _at(passes["text_passes"], measured["texts_per_s"])
    return {
        "teacher": teacher.name,
        "teacher_parameters": teacher.parameters,
        "device": str(teacher.device),
        **passes,
        **measured,
        "cache_bytes": planned_bytes(len(pictures), len(texts), teacher.dim, config.views, config.dtype),
        "estimated_seconds": seconds,
        "estimated_hours": seconds / 3600,
        "cached_already": part.stored,
    }


def _sum(costs: list[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {"teacher": " + ".join(str(cost["teacher"]) for cost in costs), "members": costs}
    for name in ("teacher_parameters", "picture_passes", "text_passes", "cache_bytes", "estimated_seconds"):
        whole[name] = sum(cost.get(name, 0) for cost in costs)
    for name in ("pictures_per_s", "texts_per_s"):  # of all members, one after the other
        seconds = sum(1 / cost[name] for cost in costs if cost.get(name))
        whole[name] = 1 / seconds if seconds else 0.0
    whole["estimated_hours"] = whole["estimated_seconds"] / 3600
    whole["cached_already"] = all(cost.get("cached_already", True) for cost in costs)
    return whole


def _rates(teacher: Teacher, pictures: list[Picture], texts: list[str], batch: int) -> dict[str, float]:
    size = min(batch, _SAMPLE_PICTURES)
    step = max(1, len(pictures) // size)
    sample = readable(teacher, pictures[::step][:size])
    words = texts[:: max(1, len(texts) // _SAMPLE_TEXTS)][:_SAMPLE_TEXTS]
    return {
        "pictures_per_s": _rate(lambda: teacher.encode_images(sample, batch=size), len(sample)),
        "texts_per_s": _rate(lambda: teacher.encode_texts(words), len(words)),
    }


def _rate(work: Callable[[], object], count: int) -> float:
    if not count:
        return 0.0
    work()  # warm up
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def _at(passes: int, rate: float) -> float:
    return passes / rate if rate else 0.0
