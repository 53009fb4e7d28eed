"""The layout ``open_clip``: what ``local-dir:`` loads, and nothing that only this package reads."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipdistill.towers.student import CONFIG, WEIGHTS, DualEncoder

FILES = (CONFIG, WEIGHTS)


def open_clip_faults(student: DualEncoder) -> Iterator[str]:
    """Why open_clip could not load a student."""
    if student.preprocess is None:
        yield "export.layouts: open_clip has no text tower alone, and this student is one: leave open_clip out"
    elif student.pruned:
        yield (
            "export.layouts: open_clip rebuilds a tower by its name, and this student's has fewer channels than that: "
            "leave open_clip out, and use onnx"
        )


def write_open_clip(student: DualEncoder, folder: Path, precisions: Sequence[str]) -> None:
    """Write the student's model as open_clip loads it, in float32.

    Args:
        student: A student without :func:`open_clip_faults`.
        folder: The export, aside.
        precisions: Of the other layouts; open_clip has one.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        saved = Path(scratch) / "student"
        student.save(saved)
        for name in FILES:
            (saved / name).replace(folder / name)
