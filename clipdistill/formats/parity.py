"""The gate: an export counts only when its consumer's own library embeds as the student does, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.core.errors import ParityError
from clipdistill.formats.layouts import Reading
from clipdistill.formats.probe import Probe, Rows
from clipdistill.formats.vectors import Stored
from clipdistill.retrieval.exact import Vectors, exact_top_k
from clipdistill.retrieval.index import VectorIndex
from clipdistill.retrieval.measures import overlap_at_k, success_at_k

BARS = {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.995}
"""The least worst-row cosine with the PyTorch student, by precision."""
_FIGURE = "figure_"
_UNIT, _TOP, _SECONDS = 1e-3, 10, 900
_READERS = Path(__file__).parent / "readers"


@dataclass(frozen=True)
class Parity:
    """How one reading of an export compares with the student.

    Attributes:
        reading: What was loaded: ``open_clip``, ``onnx/int8``.
        library: The consumer's library with its version.
        towers: For each tower its ``worst_cosine``, and how many ``rows`` that is the worst of.
        bar: What the worst cosine must reach.
        recall: ``overlap10`` of its text to picture ranking with the student's own, ``success10`` with
            ``student_success10`` beside it where the right pictures are known, and ``index_overlap10`` where the export
            has an index: of what its texts find there with what the student's find. Where fewer than 11 can be found,
            the number in the name is the largest that is not all of them. ``preprocess_cosine`` is the least of the
            pictures that the consumer resized, cropped and normalised itself, which no bar holds. ``gallery_overlap10``
            is of what a bundle's page finds with an exact search of the student's own vectors; beside it are the
            seconds to its first result and the milliseconds of a text and of a search. What cannot be measured is left
            out.
    """

    reading: str
    library: str
    towers: Mapping[str, Mapping[str, float]]
    bar: float
    recall: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(
    reading: Reading,
    folder: Path,
    probe: Probe,
    expected: Rows,
    index: VectorIndex | None = None,
    gallery: Vectors | None = None,
) -> Parity:
    """Load an export with its consumer, in a fresh process, and compare what it embeds with the student.

    Args:
        reading: What is loaded, and by which script.
        folder: The export, finished or still aside.
        probe: What is embedded.
        expected: The student's own embeddings.
        index: The export's; None where it has none.
        gallery: The vectors that its web bundle searches, or was made from; None where it has none.

    Raises:
        ParityError: If the consumer cannot load or run it, or rows are missing, not unit or too far from the
            student's, with the figures.
    """
    found, version = _read(reading, folder, probe)
    _check_tokens(reading, probe, found)
    towers: dict[str, dict[str, float]] = {}
    whole = list(probe.originals)
    wanted = {**expected, "image": expected["image"][whole]} if reading.prepares and "image" in expected else expected
    for tower, own in wanted.items():
        rows = found.get(tower)
        if rows is None or rows.shape != own.shape:
            shape = None if rows is None else list(rows.shape)
            raise ParityError(f"{reading.name}: {tower}: expected rows of shape {list(own.shape)}, found {shape}")
        alone = found.get(f"{tower}_alone", rows[:0])
        worst = min(_worst(reading, tower, rows, own), _worst(reading, tower, alone, own[: len(alone)]))
        towers[tower] = {"worst_cosine": worst, "rows": len(rows)}
    bar = BARS[reading.precision]
    recall = {} if reading.prepares else _recall(probe, found, expected)
    recall |= {} if index is None else _index_recall(index, found, expected)
    recall |= _preprocess(reading, probe, found, expected) | _gallery_recall(found, expected, gallery)
    recall |= {name[len(_FIGURE) :]: float(value) for name, value in found.items() if name.startswith(_FIGURE)}
    measured = Parity(reading.name, f"{reading.library} {version}", towers, bar, recall)
    _refuse_below(measured)
    return measured


def measure_stored(reading: Reading, folder: Path, probe: Probe, stored: Stored) -> Parity:
    """Read stored embeddings with their consumer, in a fresh process, and compare them with the student's.

    Args:
        reading: What is read, and by which script.
        folder: The export, finished or still aside.
        probe: What every reader is given.
        stored: The student's own rows.

    Raises:
        ParityError: If the consumer cannot read them, or finds other rows, with the figures.
    """
    found, version = _read(reading, folder, probe)
    keys = json.loads(found.pop("keys", np.zeros(0)).astype(np.uint8).tobytes() or "[]")
    for tower, own in stored.rows.items():
        rows = found.get(tower, own[:0])
        if len(rows) != stored.count or len(keys) != stored.count:
            counts = f"{len(rows)} rows and {len(keys)} keys"
            raise ParityError(f"{reading.name}: {tower}: expected {stored.count} rows, found {counts}")
        if rows.shape[1:] != own.shape[1:]:
            raise ParityError(f"{reading.name}: {tower}: expected rows as wide as the student's, found {rows.shape[1]}")
    wrong = [place for place, key in zip(stored.places, stored.keys, strict=True) if keys[place] != key]
    if wrong:
        raise ParityError(f"{reading.name}: row {wrong[0]} is of another picture than it was: {keys[wrong[0]]!r}")
    towers = {
        tower: {"worst_cosine": _worst(reading, tower, found[tower][stored.places], own), "rows": len(own)}
        for tower, own in stored.rows.items()
    }
    measured = Parity(reading.name, f"{reading.library} {version}", towers, BARS[reading.precision], {})
    _refuse_below(measured)
    return measured


def _refuse_below(measured: Parity) -> None:
    low = {
        tower: values["worst_cosine"]
        for tower, values in measured.towers.items()
        if not values["worst_cosine"] >= measured.bar
    }
    if low:
        figures = ", ".join(
            f"{tower} {cosine:.7f} of {measured.towers[tower]['rows']} rows" for tower, cosine in low.items()
        )
        raise ParityError(
            f"{measured.reading}: read by {measured.library}, it does not embed as the student does: worst cosine "
            f"{figures}; at least {measured.bar} is needed. Nothing was kept. Leave this layout or precision out "
            "(export.layouts, export.precisions), or report it with the student's configuration"
        )


def _worst(reading: Reading, tower: str, rows: Vectors, own: Vectors) -> float:
    """The least cosine of matching rows; 1 of none.

    Raises:
        ParityError: If a row is not of unit length.
    """
    if not len(rows):
        return 1.0
    wide, mine = rows.astype(np.float64), own.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    if not bool(np.abs(norms - 1).max() <= _UNIT):
        off = norms[np.abs(norms - 1).argmax()]
        raise ParityError(f"{reading.name}: {tower}: expected unit rows, found one of length {off:.6g}")
    return float(((wide * mine).sum(axis=1) / norms / np.linalg.norm(mine, axis=1)).min())


def _check_tokens(reading: Reading, probe: Probe, found: Rows) -> None:
    """Compare the token ids of a consumer that has a tokenizer of its own with the student's.

    Raises:
        ParityError: If they differ, with both rows of the first text that they differ in.
    """
    if "input_ids" not in found:
        return
    theirs = np.zeros_like(probe.tokens)
    shape = found["input_ids"].shape
    if shape[0] == len(theirs) and shape[1] <= theirs.shape[1]:
        theirs[:, : shape[1]] = found["input_ids"]
    wrong = np.flatnonzero((theirs != probe.tokens).any(axis=1))
    if len(wrong):
        own, other = (np.trim_zeros(rows[wrong[0]], "b").tolist() for rows in (probe.tokens, theirs))
        raise ParityError(
            f"{reading.name}: {reading.library} has other token ids than the student for {len(wrong)} of {len(theirs)} "
            f"texts, first for {probe.texts[wrong[0]][:80]!r}: {other} instead of {own}. Nothing was kept"
        )


def _preprocess(reading: Reading, probe: Probe, found: Rows, expected: Rows) -> dict[str, float]:
    """How far pictures that the consumer prepared itself are from the student's, where it prepared some."""
    rows = list(probe.originals)
    if "image_prepared" not in found or not rows:
        return {}
    return {"preprocess_cosine": _worst(reading, "image_prepared", found["image_prepared"], expected["image"][rows])}


def _recall(probe: Probe, found: Rows, expected: Rows) -> dict[str, float]:
    """The text to picture ranking through the export, against the student's own and the right pictures."""
    pictures = (found.get("image"), expected.get("image")) if probe.gallery is None else (probe.gallery,) * 2
    if pictures[0] is None or pictures[1] is None or (top := _depth(len(pictures[0]))) < 1:
        return {}
    theirs = exact_top_k(found["text"], pictures[0], top).ids
    own = exact_top_k(expected["text"], pictures[1], top).ids
    values = {f"overlap{top}": float(np.mean(overlap_at_k(theirs, own, top)))}
    asked = np.array([row for row, right in enumerate(probe.relevant) if right], np.int64)
    if len(asked):
        right = [probe.relevant[row] for row in asked]
        values[f"success{top}"] = float(np.mean(success_at_k(theirs[asked], right, top)))
        values[f"student_success{top}"] = float(np.mean(success_at_k(own[asked], right, top)))
    return values


def _index_recall(index: VectorIndex, found: Rows, expected: Rows) -> dict[str, float]:
    """How far what the export's texts find in its index is what the student's find in the same index."""
    top = _depth(len(index))
    if top < 1:
        return {}
    theirs, own = (index.search(rows["text"], top).ids for rows in (found, expected))
    return {f"index_overlap{top}": float(np.mean(overlap_at_k(theirs, own, top)))}


def _gallery_recall(found: Rows, expected: Rows, gallery: Vectors | None) -> dict[str, float]:
    """How far what a bundle's page finds is what an exact search with the student's own texts finds."""
    if gallery is None or "gallery_top" not in found or (top := _depth(len(gallery))) < 1:
        return {}
    own = exact_top_k(expected["text"], gallery, top).ids
    return {
        f"gallery_overlap{top}": float(np.mean(overlap_at_k(found["gallery_top"].astype(np.int64)[:, :top], own, top)))
    }


def _depth(rows: int) -> int:
    """How deep a ranking of so many rows is compared: 10, or one less than all, which any two rankings have alike."""
    return min(_TOP, rows - 1)


def _read(reading: Reading, folder: Path, probe: Probe) -> tuple[Rows, str]:
    """What the consumer embeds, and its version.

    Raises:
        ParityError: If its process fails, with the last line that it wrote.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "probe.npz", Path(scratch) / "rows.npz"
        probe.save(given)
        # -P: the script's own folder is not searched for modules
        command = [sys.executable, "-P", str(_READERS / reading.script), str(folder.resolve()), str(given), str(out)]
        try:
            done = subprocess.run(
                [*command, reading.precision],
                cwd=scratch,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        except subprocess.TimeoutExpired:
            raise ParityError(f"{reading.name}: {reading.library} gave no answer in {_SECONDS} s") from None
        if done.returncode != 0 or not out.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            raise ParityError(f"{reading.name}: {reading.library} cannot load or run it: {lines[-1][:400]}")
        with np.load(out, allow_pickle=False) as rows:
            return {name: np.asarray(rows[name], np.float32) for name in rows.files}, done.stdout.strip()[-40:]
