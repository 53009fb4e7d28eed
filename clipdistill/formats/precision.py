"""ONNX models in fewer bits: float16, and int8 with float32 activations."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_STEPS = 127  # of a symmetric int8 weight
_LEAST_HALVED = 16  # entries; scalars and the like save nothing
_LEAST_KERNEL = 10_000  # weights of a convolution in int8


def as_float32(model: Any) -> Any:
    """The model as it is."""
    return model


def as_float16(model: Any) -> Any:
    """The model with float16 weights that are made float32 where they are used: half the bytes, and float32 sums.

    The operations themselves stay float32, because ONNX Runtime 1.32 ends with a segmentation fault on its own float16
    form of these towers, and computes float16 in float32 on CPUs anyway. A weight beyond float16's range stays whole.

    Args:
        model: A float32 model; it is left as it is.
    """
    from onnx import TensorProto, helper, numpy_helper

    half = type(model)()
    half.CopyFrom(model)
    graph, casts = half.graph, []
    for table in list(graph.initializer):
        if table.data_type != TensorProto.FLOAT or np.prod(table.dims) < _LEAST_HALVED:
            continue
        short = _halved(numpy_helper.to_array(table))
        if short is None:
            continue
        name = f"{table.name}_half"
        casts.append(helper.make_node("Cast", [name], [table.name], name=f"{table.name}_whole", to=TensorProto.FLOAT))
        graph.initializer.remove(table)
        graph.initializer.append(numpy_helper.from_array(short, name))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return half


def as_int8(model: Any) -> Any:
    """The model with int8 weights.

    Matrix products are ONNX Runtime's dynamic quantisation: a scale for each channel, and a reduced range, because
    processors without VNNI saturate the sum of two products (worst cosine 0.991 against 0.9997). Convolutions, whose
    integer form ONNX Runtime has no fast kernel for, keep their weights in int8 with a scale for each output channel
    and compute in float32; small and depthwise kernels, which hold few of the weights and whose errors cost the most,
    are float16 (an EfficientNet-Lite0 of 4 MB grows by 0.2, and its worst cosine goes from 0.969 to 0.9994). Tables
    that rows are looked up in (of tokens) have a scale for each row.

    Args:
        model: A float32 model; it is left as it is.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as scratch, _without_warnings():
        path = Path(scratch) / "quantised.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],  # those of Gemm become such
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        quantised = onnx.load(path)
    _rewrite(quantised, "Conv", 1, _shorter_kernel)
    _rewrite(quantised, "Gather", 0, _quantised_table)
    return quantised


CONVERSIONS: dict[str, Callable[[Any], Any]] = {"fp32": as_float32, "fp16": as_float16, "int8": as_int8}
"""How a model of each precision is made from the float32 one."""


def _rewrite(model: Any, operation: str, place: int, change: Callable[[Any, str, Any], list[Any]]) -> None:
    """Let the nodes of one operation read their float32 weight, input ``place``, in int8.

    Args:
        model: Changed in place.
        operation: The nodes' operation.
        place: Which input is the weight.
        change: Called with the graph, the weight's name and the node; adds what it needs to the initializers, and
            gives the nodes that take the node's place.
    """
    graph, nodes = model.graph, []
    tables = {one.name: one for one in graph.initializer}
    uses = [name for node in graph.node for name in node.input]
    for node in graph.node:
        name = node.input[place] if node.op_type == operation else ""
        if name not in tables or uses.count(name) > 1 or not _worth_it(tables[name]):
            nodes.append(node)
            continue
        nodes.extend(change(graph, name, node))
        graph.initializer.remove(tables[name])
    del graph.node[:]
    graph.node.extend(nodes)


def _worth_it(table: Any) -> bool:
    from onnx import TensorProto

    return bool(table.data_type == TensorProto.FLOAT and len(table.dims) > 1 and np.prod(table.dims[1:]) > 1)


def _shorter_kernel(graph: Any, name: str, node: Any) -> list[Any]:
    """The convolution with its weight in float16 where that is small or depthwise, and in int8 otherwise."""
    from onnx import TensorProto, helper, numpy_helper

    kernel = _value(graph, name)
    half = _halved(kernel)
    if half is None or (kernel.size >= _LEAST_KERNEL and kernel.shape[1] > 1):
        return _quantised_kernel(graph, name, node)
    graph.initializer.append(numpy_helper.from_array(half, f"{name}_half"))
    node.input[1] = f"{name}_float"
    return [
        helper.make_node("Cast", [f"{name}_half"], [node.input[1]], name=f"{name}_float", to=TensorProto.FLOAT),
        node,
    ]


def _quantised_kernel(graph: Any, name: str, node: Any) -> list[Any]:
    """The convolution with ``DequantizeLinear(int8, scale of each output channel)`` for its weight."""
    from onnx import helper, numpy_helper

    values, scales = _by_row(_value(graph, name))
    parts = ((values, "_int8"), (scales, "_scale"), (np.zeros(len(scales), np.int8), "_zero"))
    graph.initializer.extend([numpy_helper.from_array(part, f"{name}{suffix}") for part, suffix in parts])
    whole = [f"{name}{suffix}" for _, suffix in parts]
    node.input[1] = f"{name}_float"
    return [helper.make_node("DequantizeLinear", whole, [node.input[1]], name=f"{name}_float", axis=0), node]


def _quantised_table(graph: Any, name: str, node: Any) -> list[Any]:
    """The look-up in an int8 table, times the look-up of the row's scale; of rows alone, not of columns."""
    from onnx import TensorProto, helper, numpy_helper

    values, scales = _by_row(_value(graph, name))
    scales = scales.reshape(-1, *[1] * (values.ndim - 1))
    graph.initializer.append(numpy_helper.from_array(values, f"{name}_int8"))
    graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scale"))
    rows, (out,) = node.input[1], node.output
    return [
        helper.make_node("Gather", [f"{name}_int8", rows], [f"{out}_int8"], name=f"{out}_int8", axis=0),
        helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], name=f"{out}_float", to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}_scale", rows], [f"{out}_scale"], name=f"{out}_scale", axis=0),
        helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out], name=f"{out}_rows"),
    ]


def _value(graph: Any, name: str) -> npt.NDArray[np.float32]:
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(next(one for one in graph.initializer if one.name == name)), np.float32)


def _halved(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16] | None:
    """The same in float16; None where a value is beyond its range."""
    with np.errstate(over="ignore"):
        short = values.astype(np.float16)
    return None if bool((np.isinf(short) != np.isinf(values)).any()) else short


def _by_row(table: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric int8: the nearest of 255 values, the row's largest magnitude being 127 of its scale."""
    scales = np.abs(table).reshape(len(table), -1).max(axis=1) / np.float32(_STEPS)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    steps = np.rint(table / scales.reshape(-1, *[1] * (table.ndim - 1)))
    return steps.clip(-_STEPS, _STEPS).astype(np.int8), scales


@contextmanager
def _without_warnings() -> Iterator[None]:
    """A block in which the root logger is not told what a model would gain from further preparation."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
