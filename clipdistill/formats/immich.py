"""The layout ``immich``: in ``immich/`` a model folder as the photo server immich keeps one in its cache.

What is written follows immich's public source (``machine-learning/immich_ml/models/clip`` and the server's table of
models, read in November 2026): a session for each tower, one row at a time, the first output taken as the embedding.
immich itself is no package that pip installs and was not run: the reader follows its protocol step by step.

immich takes no model of a name that it does not know, and its database has columns as wide as the known model's
embeddings. So the embeddings are filled up with zeros to the next known width, which changes no cosine, and the folder
goes into the place of a known model of that width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.core import files
from clipdistill.formats.graphs import OUTPUTS, Tower, serialised, served_dim
from clipdistill.formats.onnx import whole_graph
from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.student import DualEncoder
from clipdistill.towers.tokenizer import FILES as TOKENIZER

FOLDER = "immich"
_PARTS: dict[Tower, str] = {"image": "visual", "text": "textual"}
_TOKENIZER = TOKENIZER[:2]
PATHS = (
    f"{FOLDER}/config.json",
    f"{FOLDER}/visual/model.onnx",
    f"{FOLDER}/visual/preprocess_cfg.json",
    f"{FOLDER}/textual/model.onnx",
    *(f"{FOLDER}/textual/{name}" for name in _TOKENIZER),
)
NAMES: Mapping[int, str] = {
    512: "ViT-B-32__openai",
    640: "ViT-B-16-plus-240__laion400m_e32",
    768: "ViT-L-14__openai",
    1024: "ViT-H-14__laion2b-s32b-b79k",
    1152: "ViT-SO400M-14-SigLIP-384__webli",
    1536: "ViT-gopt-16-SigLIP2-256__webli",
}
"""A model that immich knows of each width that it knows."""


def immich_faults(student: DualEncoder) -> Iterator[str]:
    """Why immich could not use a student."""
    if student.preprocess is None:
        yield "export.layouts: immich needs both towers, and this student is a text tower alone: leave immich out"
        return
    (height, width), mode = student.preprocess.size, student.preprocess.resize_mode
    if height != width or mode == "longest":
        yield (
            "export.layouts: immich prepares square pictures, by resize_mode shortest or squash, and this student's "
            f"are {height} x {width} by {mode}: leave immich out"
        )
    if served_dim(student) > max(NAMES):
        yield (
            f"export.layouts: immich knows no embeddings wider than {max(NAMES)}, and this student's are "
            f"{served_dim(student)} wide: leave immich out, or set student.dim"
        )


def known_width(dim: int) -> int:
    """The least width that immich knows and that embeddings fit in."""
    return min(width for width in NAMES if width >= dim)


def write_immich(student: DualEncoder, folder: Path, precisions: Sequence[str]) -> None:
    """Write both towers, in float32, with what immich prepares their inputs by.

    Args:
        student: A student without :func:`immich_faults`.
        folder: The export, aside; gets ``immich/``.
        precisions: Of the layout ``onnx``; immich has one.

    Raises:
        ConfigError: If a tower cannot be written as ONNX, or not in one file.
    """
    place, dim, words = folder / FOLDER, served_dim(student), student.tokenizer
    preprocess = student.preprocess or Preprocess(size=(0, 0))
    inputs: dict[Tower, list[int]] = {"image": [1, 3, *preprocess.size], "text": [1, words.context_length]}
    for tower, part in _PARTS.items():
        model = _immich_graph(whole_graph(student, folder, tower), tower, inputs[tower], known_width(dim) - dim)
        files.write_bytes(place / part / "model.onnx", serialised(model, tower, "fp32"))
    words.save(place / "textual")
    for name in TOKENIZER[len(_TOKENIZER) :]:  # not read
        (place / "textual" / name).unlink()
    files.write_json(place / "visual" / "preprocess_cfg.json", preprocess.to_open_clip())
    text = {"context_length": words.context_length, "vocab_size": words.vocab_size}
    vision = {"image_size": preprocess.size[0]}
    # own_dim is this package's: how many of the numbers are not filling
    config = {"embed_dim": known_width(dim), "own_dim": dim, "vision_cfg": vision, "text_cfg": text}
    files.write_json(place / "config.json", config)


def _immich_graph(model: Any, tower: Tower, shape: Sequence[int], filling: int) -> Any:
    """A tower's graph with immich's one input and a batch of one, its row filled up with zeros.

    Args:
        model: As ``onnx`` has it; changed in place.
        tower: Which tower it is.
        shape: Of the input.
        filling: How many zeros.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph, name = model.graph, OUTPUTS[tower]
    first, kind = ("image", TensorProto.FLOAT) if tower == "image" else ("text", TensorProto.INT32)
    if tower == "image":
        nodes = [helper.make_node("Identity", [first], ["pixel_values"], name="pixel_values")]
    else:
        nodes = [helper.make_node("Cast", [first], ["input_ids"], name="input_ids", to=TensorProto.INT64)]
        # nothing is masked: immich pads with 0, which is what the mask would make of other paddings
        graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.int64), "attention_mask"))
    nodes += graph.node
    if filling:
        nodes.append(helper.make_node("Concat", [name, "filling"], ["embeds"], name="embeds", axis=1))
        graph.initializer.append(numpy_helper.from_array(np.zeros((1, filling), np.float32), "filling"))
    width = graph.output[0].type.tensor_type.shape.dim[-1].dim_value + filling
    for part in (graph.node, graph.input, graph.output):
        del part[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(first, kind, shape))
    graph.output.append(helper.make_tensor_value_info("embeds" if filling else name, TensorProto.FLOAT, [1, width]))
    return model


def immich_use(dim: int) -> str:
    """How an export's model gets into immich, for the card."""
    width = known_width(dim)
    filled = f", filled up with zeros to {width}, which changes no cosine" if width > dim else ""
    return (
        "immich: its service takes models of known names alone, and its database has columns of their width. `immich/` "
        f"holds this model as one of them (embeddings {dim} wide{filled}): copy its contents to "
        f"`/cache/clip/{NAMES[width]}/` of the machine-learning container's model cache, in place of what is there, "
        f"set `{NAMES[width]}` as the CLIP model in the administration's machine-learning settings, and run Smart "
        "Search for all assets. Where `MACHINE_LEARNING_MODEL_REVISION` is set, the folder is "
        f"`/cache/clip/{NAMES[width]}/REVISION/`. A model that is there is not downloaded; clearing the cache brings "
        "the known one back. The protocol was followed step by step from immich's public source; immich itself was "
        "not run. It prepares pictures on its own: where 3, 7, 11, ... pixels are cut off, it keeps the part one pixel "
        "further left or up, and releases that do not know `resize_mode` crop where this model may squash."
    )
