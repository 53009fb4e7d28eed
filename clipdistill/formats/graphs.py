"""A student's towers as ONNX graphs: any number of rows, texts of any length up to the context, unit rows out.

A student's text tower is causal and pooled at the end token, so what follows that token changes nothing: the graph cuts
its own mask and position table to the length that it is given, which equals padding the text to the context.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipdistill.core.errors import ConfigError
from clipdistill.towers import context
from clipdistill.towers.student import DualEncoder

Tower = Literal["image", "text"]

OPSET = 18
OUTPUTS: dict[Tower, str] = {"image": "image_embeds", "text": "text_embeds"}
_FEATURES = "tower_features"  # never "embedding": torch's exporter writes an invalid file where an output has that name
_EXAMPLES, _LEAST_NORM = 5, 1e-12
_LARGEST_BATCH = 1 << 16
LARGEST = (1 << 31) - (1 << 24)
"""Bytes of weights that fit an ONNX file: a protocol buffer ends at 2 GiB, and the nodes need some of it."""


class _TextTower(nn.Module):
    """Token ids and their mask to features; for a text tower alone in the teacher's space."""

    def __init__(self, model: nn.Module, weight: Tensor | None) -> None:
        super().__init__()
        self.model, self.weight = model, weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # What is masked becomes padding, whatever the caller padded with; int32, as ONNX Runtime has no ArgMax of int64
        tokens = (input_ids * attention_mask).int()
        features = context.encode(self.model, tokens)
        return features if self.weight is None else F.linear(features, self.weight)


class _ImageTower(nn.Module):
    """Normalised pixels to features."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.as_tensor(self.visual(pixel_values))


def towers_of(student: DualEncoder) -> tuple[Tower, ...]:
    """The towers that a student has."""
    return ("text",) if student.preprocess is None else ("image", "text")


def served_dim(student: DualEncoder) -> int:
    """The width of the exported embeddings: the teacher's, where a text tower alone asks in the teacher's space."""
    return student.dim if student.searches is None else student.teacher_dim


def tower_graph(student: DualEncoder, tower: Tower) -> Any:
    """A tower's features as an ONNX model in float32, not yet of unit length; :func:`unit_rows` adds that.

    Args:
        student: The student; it is left as it is.
        tower: Which of its towers.

    Returns:
        ``onnx.ModelProto``: ``input_ids`` and ``attention_mask`` int64 [batch, length], or ``pixel_values`` float32
        [batch, 3, height, width], to float32 [batch, dim].

    Raises:
        ConfigError: If torch cannot write the tower's operations as ONNX, with the reason.
    """
    model: Any = deepcopy(student.model).cpu().eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    if tower == "image":
        height, width = student.preprocess.size if student.preprocess is not None else (0, 0)
        return traced(
            _ImageTower(model.visual),
            {"pixel_values": torch.zeros(_EXAMPLES, 3, height, width)},
            {"pixel_values": {0: batch}},
        )
    length = torch.export.Dim("length", min=1, max=student.tokenizer.context_length)
    ids = torch.full((_EXAMPLES, student.tokenizer.context_length - 1), int(student.tokenizer.end_id or 0))
    return traced(
        _TextTower(model, _map_to_teacher(student)),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}},
    )


def unit_rows(model: Any, tower: Tower) -> Any:
    """The same model with rows divided by their length: after any change of precision, so that this stays float32.

    Args:
        model: As :func:`tower_graph` gives it, or a quantised form; it is left as it is.
        tower: Which tower it is, for the name of the output.
    """
    from onnx import TensorProto, helper, numpy_helper

    model, name = deepcopy(model), OUTPUTS[tower]
    graph, (features,) = model.graph, model.graph.output
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([-1], np.int64), "unit_axis"),
            numpy_helper.from_array(np.array(_LEAST_NORM, np.float32), "unit_least"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("ReduceL2", [features.name, "unit_axis"], ["unit_norm"], name="unit_norm", keepdims=1),
            helper.make_node("Max", ["unit_norm", "unit_least"], ["unit_divisor"], name="unit_divisor"),
            helper.make_node("Div", [features.name, "unit_divisor"], [name], name="unit_rows"),
        ]
    )
    dim = features.type.tensor_type.shape.dim[-1].dim_value
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", dim]))
    return model


def serialised(model: Any, tower: Tower, precision: str) -> bytes:
    """An ONNX model as the bytes of one file.

    Args:
        model: The model.
        tower: Which tower it is, for the message.
        precision: Of its weights, for the message.

    Raises:
        ConfigError: If its weights are more than a protocol buffer, and so a file, can hold.
    """
    from onnx import helper

    weights = sum(
        math.prod(table.dims) * helper.tensor_dtype_to_np_dtype(table.data_type).itemsize
        for table in model.graph.initializer
    )
    if weights > LARGEST:
        raise ConfigError(
            f"export.precisions: the {tower} tower's graph in {precision} has {weights / 1e9:.2f} GB of weights, and "
            f"an ONNX file holds {LARGEST / 1e9:.2f} GB. Write fp16 (half of fp32) or int8 (a quarter) alone, leave "
            f"out the layouts that need fp32, or take a smaller tower (student.{tower})"
        )
    return bytes(model.SerializeToString(deterministic=True))


def _map_to_teacher(student: DualEncoder) -> Tensor | None:
    """Of a text tower alone, the map into its teacher's space; the normalisation between changes no direction."""
    if student.searches is None or student.projection is None:
        return None
    return student.projection.get_parameter("text.weight").detach().cpu().clone()


def traced(module: nn.Module, inputs: dict[str, Tensor], shapes: dict[str, Any]) -> Any:
    """A module as an ONNX model in float32 with one output.

    Args:
        module: Called with its inputs by name; gives one tensor.
        inputs: Examples of them.
        shapes: Which of their dimensions are open, as ``torch.export`` takes it.

    Raises:
        ConfigError: If torch cannot write the module's operations as ONNX, with the reason.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                kwargs=inputs,
                dynamo=True,
                input_names=list(inputs),
                output_names=[_FEATURES],
                opset_version=OPSET,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as fault:
        reason = " ".join(str(fault).split())[:300]
        raise ConfigError(f"export.layouts: this student's tower cannot be written as ONNX: {reason}") from fault
    if program is None:
        raise ConfigError(
            "export.layouts: torch wrote no ONNX program; install the versions of pip 'clipdistill[export]'"
        )
    return _without_origin(program.model_proto)


def _without_origin(model: Any) -> Any:
    """The same model without the notes on where each node came from: they hold paths of this machine."""
    graph = model.graph
    for part in (*graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output, graph, model):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]  # types of the whole precision, which would be wrong after a change of it
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which attention is written in plain operations, and the exporter's progress is not logged."""
    fast, logger = torch.backends.mha.get_fastpath_enabled(), logging.getLogger("torch.onnx")
    level = logger.level
    torch.backends.mha.set_fastpath_enabled(False)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        logger.setLevel(level)
