"""The layout ``onnx``: both towers as transformers.js names them, in the folder ``onnx``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipdistill.core import files
from clipdistill.formats.graphs import Tower, tower_graph, towers_of, unit_rows
from clipdistill.formats.precision import CONVERSIONS
from clipdistill.towers.student import DualEncoder

FOLDER = "onnx"
_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
_NAMES: dict[Tower, str] = {"image": "vision_model", "text": "text_model"}


def graph_path(tower: Tower, precision: str) -> str:
    """Where a tower's graph of one precision lies, inside an export."""
    return f"{FOLDER}/{_NAMES[tower]}{_SUFFIXES[precision]}.onnx"


def write_onnx(student: DualEncoder, folder: Path, precisions: Sequence[str]) -> None:
    """Write a student's towers as ONNX graphs.

    Args:
        student: The student.
        folder: The export, aside; gets ``onnx/``.
        precisions: Of fp32, fp16 and int8.

    Raises:
        ConfigError: If a tower cannot be written as ONNX.
    """
    for tower in towers_of(student):
        whole = tower_graph(student, tower)
        for precision in precisions:
            model = unit_rows(CONVERSIONS[precision](whole), tower)
            files.write_bytes(folder / graph_path(tower, precision), model.SerializeToString(deterministic=True))
