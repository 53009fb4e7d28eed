"""Which kernels of an int8 graph are int8, and how far its outputs then are from float32's."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from clipdistill.formats.precision import as_int8

WIDE, MANY = 128, 2048


def convolutions(largest=1.0):
    """A small kernel, a depthwise one of many weights, and a large dense one, one after the other."""
    rng = np.random.default_rng(0)
    kernels = {
        "small": rng.standard_normal((WIDE, 3, 3, 3)) * largest,
        "spread": rng.standard_normal((MANY, WIDE, 1, 1)) / WIDE**0.5,
        "depthwise": rng.standard_normal((MANY, 1, 3, 3)) / 3,
        "dense": rng.standard_normal((16, MANY, 1, 1)) / MANY**0.5,
    }
    groups = {"depthwise": MANY}
    nodes, name = [], "pixels"
    for key in kernels:
        nodes.append(helper.make_node("Conv", [name, key], [f"{key}_out"], name=key, group=groups.get(key, 1)))
        name = f"{key}_out"
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16, 4, 4])],
        [numpy_helper.from_array(value.astype(np.float32), key) for key, value in kernels.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(1).standard_normal((4, 3, 8, 8)).astype(np.float32)
    return session.run(None, {"pixels": pixels})[0].reshape(4, -1)


def types(model):
    return {table.name: table.data_type for table in model.graph.initializer if len(table.dims) == 4}


def test_large_dense_kernels_are_int8_and_small_and_depthwise_ones_float16():
    whole = convolutions()
    short = as_int8(whole)
    assert types(short) == {
        "small_half": TensorProto.FLOAT16,
        "spread_int8": TensorProto.INT8,
        "depthwise_half": TensorProto.FLOAT16,
        "dense_int8": TensorProto.INT8,
    }
    assert set(types(whole).values()) == {TensorProto.FLOAT}, "the model itself is left as it is"
    found, wanted = run(short), run(whole)
    cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosines.min() > 0.9999


def test_a_small_kernel_beyond_float16_is_int8():
    assert types(as_int8(convolutions(largest=1e6)))["small_int8"] == TensorProto.INT8
