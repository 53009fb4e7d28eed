"""The layout ``triton``: in ``triton/`` a model repository for NVIDIA's Triton Inference Server, a model a tower.

Each model is the float32 graph of the layout ``onnx`` with a ``config.pbtxt`` that Triton's own schema parses. No
server was run: the reader parses the configuration with the schema of ``tritonclient``, which is the server's, and
gives ONNX Runtime exactly what the configuration states, as the server's back end does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdistill.core import files
from clipdistill.formats.graphs import Tower, serialised, towers_of
from clipdistill.formats.onnx import whole_graph
from clipdistill.towers.student import DualEncoder

FOLDER = "triton"
LARGEST_BATCH, DELAY_US = 64, 2000
"""How many rows are computed at once at most, and how long one waits for others, in microseconds."""
_PARTS = ("config.pbtxt", "1/model.onnx")
_TYPES = {1: "TYPE_FP32", 7: "TYPE_INT64"}  # by ONNX's numbers


def triton_paths(towers: Sequence[str]) -> tuple[str, ...]:
    """The files of the repository."""
    return tuple(f"{FOLDER}/{tower}/{part}" for tower in towers for part in _PARTS)


def write_triton(student: DualEncoder, folder: Path, precisions: Sequence[str]) -> None:
    """Write a model repository.

    Args:
        student: The student.
        folder: The export, aside; gets ``triton/``.
        precisions: Of the layout ``onnx``; Triton has float32.

    Raises:
        ConfigError: If a tower cannot be written as ONNX, or not in one file.
    """
    for tower in towers_of(student):
        model, place = whole_graph(student, folder, tower), folder / FOLDER / tower
        files.write_bytes(place / "1" / "model.onnx", serialised(model, tower, "fp32"))
        files.write_text(place / "config.pbtxt", _config(model, tower))


def _config(model: Any, tower: Tower) -> str:
    """The model's configuration in protocol buffers' text form; the batch is not among the dimensions."""
    parts = [f'name: "{tower}"', 'backend: "onnxruntime"', f"max_batch_size: {LARGEST_BATCH}"]
    for kind, borders in (("input", model.graph.input), ("output", model.graph.output)):
        for border in borders:
            tensor = border.type.tensor_type
            dims = ", ".join(str(dim.dim_value or -1) for dim in list(tensor.shape.dim)[1:])
            parts.append(
                f'{kind} {{\n  name: "{border.name}"\n  data_type: {_TYPES[tensor.elem_type]}\n  dims: [ {dims} ]\n}}'
            )
    parts.append(f"dynamic_batching {{\n  max_queue_delay_microseconds: {DELAY_US}\n}}")
    return "\n".join(parts) + "\n"


def triton_use(context_length: int) -> str:
    """How an export's repository is served, for the card."""
    return (
        "Triton Inference Server: `tritonserver --model-repository=FOLDER/triton` serves the model `text` "
        "(`input_ids`, `attention_mask` -> `text_embeds`) and, where there is a picture tower, `image` (`pixel_values` "
        f"-> `image_embeds`), up to {LARGEST_BATCH} rows at once. Texts may have any length up to {context_length} "
        "tokens; requests of one length are batched together, so pad with 0 (in the mask too) to one length for large "
        "batches. The configurations were parsed with Triton's own schema and run with ONNX Runtime; the server itself "
        "was not run. It needs ONNX Runtime 1.18 or newer inside."
    )
