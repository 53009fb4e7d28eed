"""The query side: what is different where ``student.image = "teacher"`` and only a text tower is trained."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipdistill.cache import AnyCache
from clipdistill.config import RunConfig
from clipdistill.core.errors import ConfigError
from clipdistill.evaluation import Judged
from clipdistill.retrieval.exact import Ids, Vectors, exact_top_k
from clipdistill.retrieval.measures import overlap_at_k, success_at_k
from clipdistill.search import QuerySide
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.build import build_query_student
from clipdistill.towers.combined import save_combined, teacher_model_cfg
from clipdistill.towers.encoder import SearchedTeacher
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.teacher import Teacher

TEXT_TOWER = "text tower"
_log = logging.getLogger("clipdistill")
_TOP = 10


def new_query_student(config: RunConfig, cache: AnyCache, teacher: Teacher | None, texts: Sequence[str]) -> DualEncoder:
    """Build the untrained text tower of a configuration, for the index of the teacher whose rows the cache holds.

    Args:
        config: The run's.
        cache: The teacher's embeddings.
        teacher: The live teacher; None where only its embeddings are given.
        texts: What the vocabulary is for.
    """
    student, known = config.student, cache.facts["teacher"]
    return build_query_student(
        text=student.text,
        dim=student.dim or next(iter(student.dims), cache.dim),
        teacher_dim=cache.dim,
        text_init=student.text_init,
        texts=texts,
        seed=config.seed,
        searches=SearchedTeacher(known["name"], known["fingerprint"]),
        pretrained=student.pretrained,
        vocab_size=student.vocab_size,
        teacher=teacher,
    )


def query_scores(rows: Judged, student: DualEncoder, teacher_images: Vectors, wanted: Ids) -> dict[str, float]:
    """A text tower's agreement with its teacher on a set, against the teacher's pictures; ``score`` is overlap@10.

    Args:
        rows: The set.
        student: The student.
        teacher_images: The teacher's embeddings of its pictures: unit rows [pictures, D].
        wanted: The teacher's own first hits [texts, 10].
    """
    ids = exact_top_k(QuerySide(student).encode_texts(rows.texts), teacher_images, _TOP).ids
    overlap = float(np.mean(overlap_at_k(ids, wanted, _TOP)))
    success = float(np.mean(success_at_k(ids, rows.relevant_pictures, _TOP)))
    return {"overlap10_text_to_image": overlap, "success10_text_to_image": success, "score": overlap}


def combine(workspace: Workspace, student: DualEncoder, teacher: Teacher | None) -> None:
    """Write the teacher's picture tower with the student's text tower as one open_clip folder, where that can be done.

    Args:
        workspace: The run; the folder is its ``combined``.
        student: The finished student.
        teacher: The live teacher; None where only its embeddings are given: then there is no picture tower to write.
    """
    shutil.rmtree(workspace.combined, ignore_errors=True)
    model = workspace.config.teacher.model
    if teacher is None or model is None:
        _log.info("combined: not written, as only the teacher's embeddings are given")
        return
    try:
        save_combined(workspace.combined, student, teacher.model, teacher_model_cfg(model))
    except ConfigError as fault:  # the student is whole without it
        _log.warning("combined: not written: %s", fault)
        return
    _log.info("combined: the teacher's picture tower with the student's text tower, in %s", workspace.combined)


def savings(pictures: int, sizes: Mapping[str, Any], speeds: Mapping[str, Any]) -> dict[str, Any]:
    """What a run saves where pictures stay as the teacher indexed them.

    Args:
        pictures: How many pictures are indexed.
        sizes: The report's ``sizes``: of the text towers.
        speeds: The report's ``speeds``.

    Returns:
        ``pictures_not_embedded_again``, and ``seconds_not_spent`` on them at the teacher's own rate; the teacher's
        ``text_tower`` and the student's in parameters and megabytes, and how many times faster the student's is;
        ``picture_parameters_not_loaded`` when a text is asked. None: not known without a live teacher.
    """
    teacher, fast, slow = sizes["teacher"], speeds["student"], speeds.get("teacher") or {}
    rate, theirs = slow.get("images_per_s"), slow.get("texts_per_s")
    return {
        "pictures_not_embedded_again": pictures,
        "seconds_not_spent": pictures / rate if rate else None,
        "text_tower": {
            who: {field: sizes[who].get(field) for field in ("parameters", "megabytes")}
            for who in ("teacher", "student")
        },
        "texts_per_s_ratio": fast["texts_per_s"] / theirs if theirs else None,
        "picture_parameters_not_loaded": teacher.get("picture_parameters"),
    }
