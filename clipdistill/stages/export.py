"""The export stage: a run's student in the layouts that its consumers read, proved with the run's own rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdistill.config import RunConfig, evaluation_sets
from clipdistill.core import files
from clipdistill.core.errors import DataError
from clipdistill.data.records import Pair
from clipdistill.evaluation import Judged, judged
from clipdistill.formats import CardFacts, ExportReport, Probe
from clipdistill.formats import export as export_student
from clipdistill.retrieval.exact import Vectors
from clipdistill.stages.index import indexed_pairs
from clipdistill.stages.inputs import RunData, load_data, open_cache
from clipdistill.stages.teachers import open_teachers
from clipdistill.stages.workspace import Workspace
from clipdistill.towers.student import DualEncoder

_log = logging.getLogger("clipdistill")


def export_run(workspace: Workspace, to: Path | None = None) -> ExportReport:
    """Export the student of a run.

    Args:
        workspace: A run with a student.
        to: The export's folder; None takes the run's ``export``.

    Raises:
        ConfigError: If this student cannot be written in a layout.
        DataError: If the run has no student yet, or no rows to prove an export with, or the folder is something else.
        MismatchError: If the run's index was built with another student.
        MissingExtraError: If a library is missing.
        ParityError: If a consumer embeds otherwise than the student; no export is left then.
    """
    if not workspace.student.exists():
        raise DataError(f"{workspace.student}: not there yet. Make it with: clipdistill train RUN.toml")
    config = workspace.config
    student = DualEncoder.load(workspace.student, max_pixels=config.data.max_pixels)
    data = load_data(workspace)
    rows = judged("export", spread(_proving_pairs(config, data), config.export.probes))
    gallery = _gallery(workspace, data, rows) if student.searches is not None else None
    probe = Probe.of(student, rows.texts, rows.pictures, relevant=rows.relevant_pictures, gallery=gallery)
    return export_student(
        student,
        to or workspace.export,
        config.export.layouts,
        config.export.precisions,
        probe=probe,
        facts=_facts(workspace, student),
        index=_index(workspace),
        pairs=indexed_pairs(workspace, data),
    )


def spread(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many pairs, evenly from the first to the last: the same ones each time."""
    count = min(len(pairs), most)
    return [pairs[place * len(pairs) // count] for place in range(count)]


def _proving_pairs(config: RunConfig, data: RunData) -> list[Pair]:
    """The rows of the first evaluation set that has both pictures and texts; of ``val`` or ``train`` where none has.

    Raises:
        DataError: If no set has any.
    """
    for name in (*evaluation_sets(config), "val", "train"):
        pairs = data.sets[name].pairs if name in data.sets else ()
        whole = [pair for pair in pairs if pair.picture is not None and pair.captions]
        if whole:
            return whole
    raise DataError("export: no set has pictures with texts to prove an export with; give data.test or data.val")


def _gallery(workspace: Workspace, data: RunData, rows: Judged) -> Vectors:
    """The teacher's stored embeddings of the pictures that a text tower alone searches."""
    cache, _ = open_cache(workspace, data, open_teachers(workspace.config))
    return cache.image_rows(rows.keys)


def _index(workspace: Workspace) -> Path | None:
    """The run's index, where there is one and it is to travel along."""
    if not workspace.config.export.index:
        return None
    if not workspace.index.exists():
        _log.info("export: without an index, as the run has none. Make it with: clipdistill index RUN.toml")
        return None
    return workspace.index


def _facts(workspace: Workspace, student: DualEncoder) -> CardFacts:
    config = workspace.config
    report: dict[str, Any] = {}
    if workspace.report_json.exists():
        found = files.read_json(workspace.report_json)
        report = found if found.get("student_fingerprint") == student.fingerprint else {}
    teacher = report.get("sizes", {}).get("teacher", {}).get("name") or config.teacher.model
    return CardFacts(
        name=config.name,
        licence=config.export.licence,
        teacher=teacher,
        teacher_licence=config.export.teacher_licence,
        data_licence=config.export.data_licence,
        report=report,
    )
