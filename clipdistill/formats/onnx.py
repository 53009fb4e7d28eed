"""The layout ``onnx``: both towers in the folder ``onnx``, named and described as transformers.js reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdistill.core import files
from clipdistill.formats import hub_files
from clipdistill.formats.graphs import Tower, serialised, served_dim, tower_graph, towers_of, unit_rows
from clipdistill.formats.precision import CONVERSIONS
from clipdistill.towers.student import DualEncoder

FOLDER = "onnx"
_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}
_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8"}  # transformers.js' names of them
_NAMES: dict[Tower, str] = {"image": "vision_model", "text": "text_model"}


def graph_path(tower: Tower, precision: str) -> str:
    """Where a tower's graph of one precision lies, inside an export."""
    return f"{FOLDER}/{_NAMES[tower]}{_SUFFIXES[precision]}.onnx"


def whole_graph(student: DualEncoder, folder: Path, tower: Tower) -> Any:
    """A tower's float32 graph with unit rows: the one in ``onnx`` where it is there already, else a new one.

    Args:
        student: The student.
        folder: The export, aside.
        tower: Which tower.

    Raises:
        ConfigError: If the tower cannot be written as ONNX.
    """
    import onnx

    path = folder / graph_path(tower, "fp32")
    return onnx.load(path) if path.exists() else unit_rows(tower_graph(student, tower), tower)


def write_onnx(student: DualEncoder, folder: Path, precisions: Sequence[str]) -> None:
    """Write a student's towers as ONNX graphs.

    Args:
        student: The student.
        folder: The export, aside; gets ``onnx/``, and the configurations that transformers.js asks for.
        precisions: Of fp32, fp16 and int8.

    Raises:
        ConfigError: If a tower cannot be written as ONNX, or not in one file.
    """
    for tower in towers_of(student):
        whole = tower_graph(student, tower)
        for precision in precisions:
            model = unit_rows(CONVERSIONS[precision](whole), tower)
            files.write_bytes(folder / graph_path(tower, precision), serialised(model, tower, precision))
    write_configs(student, folder)


def onnx_in_javascript(precision: str, length: int) -> str:
    """The model card's words on loading the graphs with transformers.js.

    Args:
        precision: One that the export has.
        length: The student's context, in tokens.
    """
    return f"""\
transformers.js:

```javascript
import {{ AutoTokenizer, CLIPTextModelWithProjection }} from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("FOLDER");
const model = await CLIPTextModelWithProjection.from_pretrained("FOLDER", {{ dtype: "{_DTYPES[precision]}" }});
const {{ text_embeds }} = await model(tokenizer(["a red bicycle"], {{ padding: true, truncation: true }}));
```

It cuts a text of more than {length} tokens with its end token, and such a text's embedding is then another."""


def write_configs(student: DualEncoder, folder: Path) -> None:
    """Write the configurations that transformers.js asks for beside the graphs.

    Args:
        student: The student.
        folder: The one that holds ``onnx/``.
    """
    hub_files.write_config(folder, _config(student), over=False)
    if student.preprocess is not None and not list(hub_files.processor_faults(student.preprocess, FOLDER)):
        hub_files.write_processor(folder, student.preprocess)


def _config(student: DualEncoder) -> dict[str, Any]:
    """A ``config.json`` by which ``CLIPTextModelWithProjection`` and its sibling of transformers.js take the graphs.

    It says what goes in and out, not how the towers are built: that is in the graphs.
    """
    ids = hub_files.special_ids(student.tokenizer)
    text = {"max_position_embeddings": student.tokenizer.context_length, "vocab_size": student.tokenizer.vocab_size}
    vision = {} if student.preprocess is None else {"vision_config": {"image_size": student.preprocess.size[0]}}
    return {
        "model_type": "clip",
        "projection_dim": served_dim(student),
        "text_config": {**text, **ids},
        **vision,
        **ids,
    }
