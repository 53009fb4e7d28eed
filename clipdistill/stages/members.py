"""What each teacher of an ensemble reaches alone, so that one sees whether the ensemble is better than its best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from clipdistill.cache import EnsembleCache, TeacherCache
from clipdistill.data.records import Pair
from clipdistill.evaluation import Embedded, Judged, evaluate_embedded, judged
from clipdistill.stages.teachers import WholeTeacher
from clipdistill.towers.ensemble import EnsembleTeacher

_EXACT, _ALONE = "exact", "student"  # the evaluation's names for one encoder searched exactly


def measure_members(
    cache: EnsembleCache,
    sets: Mapping[str, Sequence[Pair]],
    teacher: WholeTeacher | None,
    *,
    ks: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Measure every member by exact search: against the ground truth, and against the whole ensemble.

    Args:
        cache: The ensemble's embeddings.
        sets: The evaluation sets' rows by name.
        teacher: The live ensemble; None where the members' sizes are not known.
        ks: The cut-offs.

    Returns:
        For each member ``name``, ``weight`` (a share of 1), ``scale``, ``dim``, ``parameters`` where known, and
        ``rows``, each a :class:`ReportRow` as plain values with the pairing ``member``. Their ``retention`` is the
        member's success divided by the ensemble's over the same queries, and their ``overlap`` is with its ranking.
    """
    facts = cache.facts["teacher"]["members"]
    sizes = [part.parameters for part in teacher.teachers] if isinstance(teacher, EnsembleTeacher) else []
    found: list[dict[str, Any]] = [
        {**fact, **({"parameters": sizes[number]} if sizes else {}), "rows": []} for number, fact in enumerate(facts)
    ]
    for name, pairs in sets.items():
        rows = judged(name, pairs)
        whole = Embedded(cache.image_rows(rows.keys), cache.text_rows(rows.texts), cache.fingerprint)
        for member, told in zip(cache.members, found, strict=True):
            told["rows"] += _measured(rows, member.cache, whole, ks)
    return found


def _measured(rows: Judged, cache: TeacherCache, whole: Embedded, ks: tuple[int, ...]) -> list[dict[str, Any]]:
    own = Embedded(cache.image_rows(rows.keys), cache.text_rows(rows.texts), cache.fingerprint)
    report = evaluate_embedded(rows, own, teacher=whole, ks=ks, seed=0)
    return [
        asdict(replace(row, pairing="member")) for row in report.rows if (row.pairing, row.search) == (_ALONE, _EXACT)
    ]
