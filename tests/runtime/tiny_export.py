"""A tiny export in plain ONNX operations, whose embeddings numpy computes too: no torch between the two.

A text is the sum of its tokens' rows, each times its place; a picture is the mean of each channel of each quarter,
times a matrix. Both are divided by their length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from onnx import TensorProto, helper, numpy_helper

from clipdistill.core import files, manifest
from clipdistill.data.records import Picture
from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.tokenizer import StudentTokenizer, default_backend
from clipdistill.towers.vocabulary import prune

DIM, CONTEXT, SIZE = 6, 16, 32
ENCODER, TEACHER = "e" * 64, "f" * 64
TEXTS = [tiny.caption(number) for number in range(30)] + ["", "🦊 中文", "a very long caption about a cat " * 20]
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass(frozen=True)
class Weights:
    table: np.ndarray
    """[vocabulary, DIM]"""
    matrix: np.ndarray
    """[12, DIM]"""

    def text(self, tokens: Sequence[int]) -> np.ndarray:
        """One embedding, not yet unit, one token after the other."""
        return sum(place * self.table[token].astype(np.float64) for place, token in enumerate(tokens, 1))

    def picture(self, pixels: np.ndarray) -> np.ndarray:
        """One embedding of [3, SIZE, SIZE], not yet unit."""
        half = SIZE // 2
        means = [
            pixels[channel, row : row + half, column : column + half].astype(np.float64).mean()
            for channel in range(3)
            for row in (0, half)
            for column in (0, half)
        ]
        return np.array(means) @ self.matrix.astype(np.float64)


def tokenizer() -> StudentTokenizer:
    return StudentTokenizer(prune(default_backend(), TEXTS).backend, CONTEXT)


def weights(vocabulary: int, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return Weights(
        rng.standard_normal((vocabulary, DIM)).astype(np.float32), rng.standard_normal((12, DIM)).astype(np.float32)
    )


def text_graph(table: np.ndarray, output: str = "text_embeds") -> bytes:
    float_ids, node = TensorProto.FLOAT, helper.make_node
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    ]
    nodes = [
        node("Gather", ["table", "input_ids"], ["rows"]),
        node("Cast", ["attention_mask"], ["mask"], to=float_ids),
        node("CumSum", ["mask", "one"], ["places"]),
        node("Mul", ["mask", "places"], ["weights"]),
        node("Unsqueeze", ["weights", "last"], ["column"]),
        node("Mul", ["rows", "column"], ["weighted"]),
        node("ReduceSum", ["weighted", "middle"], ["sum"], keepdims=0),
    ]
    constants = {"table": table, "one": np.array(1, np.int64), "last": np.array([2]), "middle": np.array([1])}
    return _graph(nodes, inputs, constants, output, table.shape[1])


def picture_graph(matrix: np.ndarray, size: int = SIZE) -> bytes:
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, size, size])]
    half = [size // 2, size // 2]
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], ["quarters"], kernel_shape=half, strides=half),
        helper.make_node("Flatten", ["quarters"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["sum"]),
    ]
    return _graph(nodes, inputs, {"matrix": matrix}, "image_embeds", matrix.shape[1])


def _graph(nodes: list[Any], inputs: list[Any], constants: Mapping[str, Any], output: str, dim: int) -> bytes:
    nodes = [
        *nodes,
        helper.make_node("ReduceL2", ["sum", "columns"], ["norm"], keepdims=1),
        helper.make_node("Div", ["sum", "norm"], [output]),
    ]
    held = [numpy_helper.from_array(value, name) for name, value in {**constants, "columns": np.array([1])}.items()]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", dim])]
    graph = helper.make_graph(nodes, "tower", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def write(folder: Path, *, precisions: Sequence[str] = ("fp32",), pictures: bool = True, **changes: Any) -> Weights:
    """An export with a graph of other weights for each precision; returns those of the first."""
    words = tokenizer()
    folder.mkdir(parents=True)
    words.save(folder)
    made = [weights(words.vocab_size, seed) for seed in range(len(precisions))]
    for precision, values in zip(precisions, made, strict=True):
        files.write_bytes(folder / f"onnx/text_model{SUFFIXES[precision]}.onnx", text_graph(values.table))
        if pictures:
            files.write_bytes(folder / f"onnx/vision_model{SUFFIXES[precision]}.onnx", picture_graph(values.matrix))
    sign(folder, **{"precisions": list(precisions), **({} if pictures else alone()), **changes})
    return made[0]


def alone() -> dict[str, Any]:
    return {"encoder": TEACHER, "preprocess": None, "searches": {"name": "big", "fingerprint": TEACHER}}


def sign(folder: Path, **changes: Any) -> None:
    """Write the manifest of what lies in the folder now."""
    (folder / manifest.NAME).unlink(missing_ok=True)
    values = {
        "encoder": ENCODER,
        "dim": DIM,
        "context_length": CONTEXT,
        "preprocess": Preprocess((SIZE, SIZE)).to_open_clip(),
        "max_pixels": 1_000_000,
        "layouts": ["onnx"],
        "precisions": ["fp32"],
        "parity": {},
        "searches": None,
        **changes,
    }
    manifest.write(folder, "export", 1, {key: value for key, value in values.items() if value is not ...})


def pictures(count: int) -> list[Picture]:
    sizes = [(40, 36), (31, 77), (64, 64), (200, 20), (32, 32)]
    return [Picture(f"memory[{n}]", data=tiny.image_bytes(n, sizes[n % len(sizes)])) for n in range(count)]
