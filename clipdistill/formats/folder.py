"""Writing an export and checking one: a folder whose every layout was loaded by its consumer before it counts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipdistill.core import files, fingerprint, manifest
from clipdistill.core.errors import ConfigError, DataError, MismatchError
from clipdistill.data.records import Pair
from clipdistill.formats import web
from clipdistill.formats.card import CardFacts, card
from clipdistill.formats.contents import INDEX_FILES, check_contents, copied_index, index_facts
from clipdistill.formats.graphs import served_dim
from clipdistill.formats.layouts import (
    LAYOUTS,
    PRECISIONS,
    Reading,
    check_packages,
    chosen_layouts,
    files_of,
    name_faults,
    readings_of,
)
from clipdistill.formats.parity import Parity, measure, measure_stored
from clipdistill.formats.probe import CHECK, Probe, Rows, expected_rows, read_check, write_check
from clipdistill.formats.vectors import FOLDER as VECTORS
from clipdistill.formats.vectors import Stored, read_stored, write_vectors
from clipdistill.formats.web_vendor import vendored
from clipdistill.retrieval.exact import Vectors
from clipdistill.retrieval.index import FOLDER, VectorIndex
from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.student import DualEncoder

KIND, VERSION = "export", 1
CARD = "README.md"
_REMEDY = "Export again (clipdistill export RUN.toml), or copy the folder again from where it was made."
_log = logging.getLogger("clipdistill")


@dataclass(frozen=True)
class ExportReport:
    """An export, and how its readers compare with the student.

    Attributes:
        folder: Where it lies.
        encoder: The fingerprint that an index for it carries: the student's, or its teacher's for a text tower alone.
        dim: The width of the embeddings.
        layouts: By name.
        precisions: Those of ``onnx``.
        parities: One for each reading.
        sizes: Bytes by file.
        vectors: How many pictures its index holds; 0 where it has none.
    """

    folder: Path
    encoder: str
    dim: int
    layouts: tuple[str, ...]
    precisions: tuple[str, ...]
    parities: tuple[Parity, ...]
    sizes: dict[str, int]
    vectors: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        parities = [one.to_json() for one in self.parities]
        return {**asdict(self), "folder": str(self.folder), "parities": parities, "bytes": sum(self.sizes.values())}

    def lines(self) -> list[str]:
        """What a person wants to know, a line a reading and tower."""
        found, width = [], max((len(one.reading) for one in self.parities), default=0)
        for one in self.parities:
            for tower, values in one.towers.items():
                cosine = f"worst cosine {values['worst_cosine']:.7f} of {values['rows']} rows (at least {one.bar})"
                found.append(f"{one.reading:<{width}}  {tower:<5}  {cosine}  {one.library}")
            if one.recall:
                recall = "  ".join(f"{name} {value:.4f}" for name, value in one.recall.items())
                found.append(f"{one.reading:<{width}}  {recall}")
        index = f", with an index of {self.vectors} pictures" if self.vectors else ""
        return [*found, f"export: {self.folder} ({sum(self.sizes.values()) / 1e6:.1f} MB{index})"]


def export(
    student: DualEncoder,
    folder: str | Path,
    layouts: Sequence[str] = (),
    precisions: Sequence[str] = ("fp32", "int8"),
    *,
    probe: Probe,
    facts: CardFacts | None = None,
    index: str | Path | None = None,
    pairs: Sequence[Pair] = (),
    gallery: web.Gallery | None = None,
) -> ExportReport:
    """Write a student in the layouts that its consumers read, and keep it only if each of them embeds as it does.

    Args:
        student: The student.
        folder: Takes the place of an older export, at once and only when all is written and proved.
        layouts: Of :data:`~clipdistill.formats.layouts.LAYOUTS`; none = all that this student can be written in, but
            for those that are asked for by name alone.
        precisions: Of the ONNX graphs: fp32, fp16, int8.
        probe: What the layouts are proved with.
        facts: What the model card says beside what is measured.
        index: The folder of an index that was built with this student, or with the teacher that a text tower alone
            searches; a copy of it travels in ``index/``. None: no index.
        pairs: Whose pictures' and texts' embeddings the layout ``vectors`` holds.
        gallery: What the layout ``web`` searches; needed for it alone.

    Raises:
        ConfigError: If a name is unknown, or this student cannot be written in a layout: all faults at once.
        DataError: If the folder holds something else than an export.
        MismatchError: If another encoder made the index, with both fingerprints, or npm gave other than is pinned.
        MissingExtraError: If a library is missing, or the browser or npm's packages of a web bundle.
        ParityError: If a consumer embeds otherwise than the student, with the figures; no export is left then.
    """
    folder, layouts, precisions = Path(folder), chosen_layouts(student, layouts), tuple(precisions)
    faults = list(_faults(student, layouts, precisions, pairs, gallery))
    if faults:
        raise ConfigError(faults)
    check_packages(layouts)
    searched = gallery if web.FOLDER in layouts else None
    scripts = {} if searched is None else vendored(searched.vendor)
    _refuse_other(folder)
    values = _values(student, layouts, precisions)
    with files.replaced_folder(folder) as aside:
        found = None if index is None else copied_index(Path(index), aside, values["encoder"])
        student.tokenizer.save(aside)
        for name in sorted(layouts, key=list(LAYOUTS).index):  # some take up what those before them made
            _log.info("export: writing %s", name)
            LAYOUTS[name].write(student, aside, precisions)
        stored = write_vectors(student, aside, pairs) if VECTORS in layouts else None
        if searched is not None:
            web.write_web(student, aside, searched, scripts)
        rows = None if searched is None else searched.vectors
        readings = readings_of(layouts, precisions)
        parities = _measured(readings, aside, probe, expected_rows(student, probe), found, stored, rows)
        write_check(student, probe, aside / CHECK)
        values["index"] = index_facts(found)
        files.write_text(aside / CARD, card(facts or CardFacts(), values, parities, _sizes(aside)))
        values |= {
            "parity": {one.reading: one.towers for one in parities},
            "recall": {one.reading: one.recall for one in parities},
            "needs": [*files_of(layouts, student, precisions), *(() if found is None else INDEX_FILES)],
        }
        manifest.write(aside, KIND, VERSION, values, fingerprint.of_folder(aside, skip=()))
    return _report(folder, values, parities, found)


def _faults(
    student: DualEncoder,
    layouts: Sequence[str],
    precisions: Sequence[str],
    pairs: Sequence[Pair],
    gallery: web.Gallery | None,
) -> Iterator[str]:
    """Why an export cannot be written as it is asked for, one sentence each."""
    yield from name_faults(layouts, precisions)
    for name in layouts:
        if name in LAYOUTS:
            yield from LAYOUTS[name].faults(student)
    if VECTORS in layouts and not pairs:
        yield "export.layouts: vectors: there are no pictures whose embeddings it could hold"
    yield from web.gallery_faults(layouts, gallery, served_dim(student))


def verify(folder: str | Path) -> ExportReport:
    """Compare an export's files with their SHA-256, and load each of its layouts again as its consumer does.

    What is embedded are the few probes that travel with it, whose embeddings by the student travel too.

    Args:
        folder: The export.

    Raises:
        DataError: If it is no export.
        MismatchError: If a file is missing, is not the one that was written or is not listed, or another encoder made
            the index.
        MissingExtraError: If a consumer's library is missing.
        ParityError: If a consumer embeds otherwise here than the student did.
    """
    folder = Path(folder)
    values = manifest.read(folder, KIND, VERSION, _REMEDY)
    _check_values(folder, values)
    check_contents(folder, values["files"], _REMEDY)
    layouts, precisions = tuple(values["layouts"]), tuple(values["precisions"])
    check_packages(layouts)
    probe, expected = read_check(folder / CHECK, _preprocess(folder, values))
    index = None if values["index"] is None else VectorIndex.load(folder / FOLDER, encoder=values["encoder"])
    stored = read_stored(folder) if VECTORS in layouts else None
    rows = web.bundle_vectors(folder) if web.FOLDER in layouts else None
    parities = _measured(readings_of(layouts, precisions), folder, probe, expected, index, stored, rows)
    return _report(folder, values, parities, index)


def _measured(
    readings: Sequence[Reading],
    folder: Path,
    probe: Probe,
    expected: Rows,
    index: VectorIndex | None,
    stored: Stored | None,
    gallery: Vectors | None,
) -> list[Parity]:
    found = []
    for reading in readings:
        _log.info("export: loading %s with %s", reading.name, reading.library)
        if reading.name == VECTORS and stored is not None:
            found.append(measure_stored(reading, folder, probe, stored))
        else:
            found.append(measure(reading, folder, probe, expected, index, gallery))
    return found


def _report(
    folder: Path,
    values: dict[str, Any],
    parities: Sequence[Parity],
    index: VectorIndex | None,
) -> ExportReport:
    return ExportReport(
        folder,
        values["encoder"],
        values["dim"],
        tuple(values["layouts"]),
        tuple(values["precisions"]),
        tuple(parities),
        _sizes(folder),
        0 if index is None else len(index),
    )


def _preprocess(folder: Path, values: dict[str, Any]) -> Preprocess | None:
    """The export's preprocessing; None for a text tower alone.

    Raises:
        DataError: If the manifest's is none.
    """
    if values["preprocess"] is None:
        return None
    try:
        return Preprocess.from_open_clip(values["preprocess"])
    except (TypeError, ValueError) as fault:
        raise DataError(f"{folder / manifest.NAME}: preprocess: {fault}. {_REMEDY}") from fault


def _values(student: DualEncoder, layouts: Sequence[str], precisions: Sequence[str]) -> dict[str, Any]:
    return {
        "encoder": student.fingerprint if student.searches is None else student.searches.fingerprint,
        "student": student.fingerprint,
        "dim": served_dim(student),
        "context_length": student.tokenizer.context_length,
        "preprocess": None if student.preprocess is None else student.preprocess.to_open_clip(),
        "max_pixels": student.max_pixels,
        "layouts": list(layouts),
        "precisions": list(precisions) if "onnx" in layouts else [],
        "searches": None if student.searches is None else asdict(student.searches),
    }


def _check_values(folder: Path, values: dict[str, Any]) -> None:
    """Refuse a manifest that does not say what an export's says: it was changed after it was written.

    Raises:
        DataError: If a field is missing or of another type, or names something unknown.
        MismatchError: If a file that a layout needs is not among those that have a digest.
    """
    kinds = {"files": dict, "needs": list, "layouts": list, "precisions": list, "encoder": str, "dim": int}
    place = folder / manifest.NAME
    for field, kind in kinds.items():
        if not isinstance(values.get(field), kind):
            raise DataError(f"{place}: {field} is missing or no {kind.__name__}. {_REMEDY}")
    for field in ("preprocess", "index"):
        if not isinstance(values.setdefault(field, None), dict | None):
            raise DataError(f"{place}: {field} is neither a mapping nor null. {_REMEDY}")
    faults = list(name_faults(values["layouts"], values["precisions"] or PRECISIONS))
    if faults:
        raise DataError(f"{place}: {'; '.join(faults)}. {_REMEDY}")
    for name in (CHECK, "tokenizer.json", *values["needs"]):
        if name not in values["files"]:
            raise MismatchError(str(folder / name), "sha256", "a digest in the manifest", "none", _REMEDY)


def _refuse_other(folder: Path) -> None:
    """Never replace what is not an export.

    Raises:
        DataError: If something else lies there.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        manifest.read(folder, KIND, VERSION, "")
    except (DataError, MismatchError, NotADirectoryError):
        raise DataError(
            f"{folder}: holds something else than an export, and is left alone; give another --to"
        ) from None


def _sizes(folder: Path) -> dict[str, int]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
