"""The inspection: what the data hold, and what the run will cost, before anything expensive runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from clipdistill.cache.fill import planned_bytes
from clipdistill.data.records import Picture
from clipdistill.data.survey import survey
from clipdistill.stages.coverage import coverage, readable
from clipdistill.stages.inputs import RunData, open_teacher
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
    teacher = open_teacher(workspace.config)
    sets = {name: survey(source).to_json() for name, source in data.sets.items()}
    extra = {"images": len(data.images), "texts": len(data.texts)}
    price = cost(workspace, data, teacher)
    covered = coverage(workspace, data, teacher, price.get("pictures_per_s", 0.0), price.get("texts_per_s", 0.0))
    return {"sets": sets, "unpaired": extra, "unused": data.unused, "cost": price, "coverage": covered}


def cost(workspace: Workspace, data: RunData, teacher: Teacher | None) -> dict[str, Any]:
    """What caching the teacher will take: passes, bytes, and seconds at the rate measured now on a few rows."""
    config = workspace.config
    texts = list(dict.fromkeys([*(text for pair in data.pairs for text in pair.captions), *data.texts]))
    pictures = [pair.picture for pair in data.pairs if pair.picture is not None]
    if teacher is None:
        return {"teacher": config.teacher.embeddings, "picture_passes": 0, "text_passes": 0, "cache_bytes": 0}
    stored = (workspace.cache / "manifest.json").exists()
    passes = {"picture_passes": len(pictures) * config.cache.views, "text_passes": len(texts)}
    measured = _rates(teacher, pictures, texts, config.teacher.batch)
    seconds = _at(passes["picture_passes"], measured["pictures_per_s"])
    seconds += _at(passes["text_passes"], measured["texts_per_s"])
    return {
        "teacher": teacher.name,
        "teacher_parameters": teacher.parameters,
        "device": str(teacher.device),
        **passes,
        **measured,
        "cache_bytes": planned_bytes(len(pictures), len(texts), teacher.dim, config.cache.views, config.cache.dtype),
        "estimated_seconds": seconds,
        "estimated_hours": seconds / 3600,
        "cached_already": stored,
    }


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
