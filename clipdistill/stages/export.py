"""The export stage: a run's student in the layouts that its consumers read, proved with the run's own rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipdistill.config import RunConfig, evaluation_sets
from clipdistill.core import files
from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Pair
from clipdistill.evaluation import Judged, judged
from clipdistill.formats import CardFacts, ExportReport, Gallery, Probe
from clipdistill.formats import export as export_student
from clipdistill.retrieval.exact import Vectors
from clipdistill.retrieval.index import VectorIndex
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
        ConfigError: If this student cannot be written in a layout, or a web bundle would search too many pictures.
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
    searched = _searched(workspace, data)
    rows = judged("export", spread(_proving_pairs(config, data), config.export.probes))
    gallery = _gallery(workspace, data, rows) if student.searches is not None else None
    probe = Probe.of(student, rows.texts, rows.pictures, relevant=rows.relevant_pictures, gallery=gallery)
    return export_student(
        student,
        to or workspace.export,
        config.export.layouts,
        config.export.precisions,
        probe=probe,
        facts=card_facts(config, _report(workspace, student)),
        index=_index(workspace),
        pairs=indexed_pairs(workspace, data),
        gallery=_web_gallery(workspace, data, student, searched) if searched else None,
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


def _searched(workspace: Workspace, data: RunData) -> list[Pair]:
    """The rows whose pictures a web bundle searches, as the run's index does; none where no bundle is asked for.

    Raises:
        ConfigError: If they are more than a browser is to load.
    """
    config = workspace.config.export
    if "web" not in config.layouts:
        return []
    pairs = indexed_pairs(workspace, data)
    if len(pairs) > config.web_vectors:
        raise ConfigError(
            f"export.layouts: web: {len(pairs)} pictures are indexed, and a bundle searches {config.web_vectors} at "
            "most (export.web_vectors): name fewer sets in index.sets, raise export.web_vectors if the visitors' "
            "devices bear it, or leave web out and search with: clipdistill serve EXPORT"
        )
    return pairs


def _web_gallery(workspace: Workspace, data: RunData, student: DualEncoder, pairs: Sequence[Pair]) -> Gallery:
    """What a web bundle searches, with the vectors of the run's index where that keeps them."""
    config, keys = workspace.config, [pair.key for pair in pairs]
    pictures = [pair.picture for pair in pairs if pair.picture is not None]
    if student.searches is not None:
        vectors = open_cache(workspace, data, open_teachers(config))[0].image_rows(keys)
    else:
        stored = _indexed(workspace, student, keys)
        vectors = student.encode_images(pictures) if stored is None else stored
    thumbnails, vendor = config.export.web_thumbnails, config.export.web_vendor
    return Gallery(config.name, tuple(keys), vectors, tuple(pictures), thumbnails, Path(vendor) if vendor else None)


def _indexed(workspace: Workspace, student: DualEncoder, keys: Sequence[str]) -> Vectors | None:
    """The vectors of the run's index; None where it is another student's, of other pictures, or keeps none whole."""
    try:
        index = VectorIndex.load(workspace.index, encoder=student.fingerprint)
        return index.vectors() if list(index.ids) == list(keys) else None
    except (DataError, MismatchError):
        return None


def _index(workspace: Workspace) -> Path | None:
    """The run's index, where there is one and it is to travel along."""
    if not workspace.config.export.index:
        return None
    if not workspace.index.exists():
        _log.info("export: without an index, as the run has none. Make it with: clipdistill index RUN.toml")
        return None
    return workspace.index


def card_facts(config: RunConfig, report: Mapping[str, Any] | None = None) -> CardFacts:
    """What the model card says beside what is measured.

    Args:
        config: The run's configuration.
        report: The report of the student that is exported; None where it was not evaluated.
    """
    report = report or {}
    teacher = report.get("sizes", {}).get("teacher", {}).get("name") or config.teacher.model
    return CardFacts(
        name=config.name,
        licence=config.export.licence,
        teacher=teacher,
        teacher_licence=config.export.teacher_licence,
        data_licence=config.export.data_licence,
        report=report,
    )


def _report(workspace: Workspace, student: DualEncoder) -> dict[str, Any] | None:
    if not workspace.report_json.exists():
        return None
    found: dict[str, Any] = files.read_json(workspace.report_json)
    return found if found.get("student_fingerprint") == student.fingerprint else None
