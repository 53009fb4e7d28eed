"""The teacher in ONNX Runtime, float32: what a student has to be faster than when both are served in the same way.

The towers are written by torch's own exporter and optimised by ONNX Runtime as any graph is; pictures and texts go
through the teacher's own transform and tokenizer, and padding is cut away where that changes nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn

from clipdistill.data.pictures import decode
from clipdistill.data.records import Picture
from clipdistill.towers import context
from clipdistill.towers.encoder import Vectors
from clipdistill.towers.teacher import Teacher

OPSET, EXAMPLES, LARGEST_BATCH = 18, 3, 4096


class OnnxTeacher:
    """A teacher's towers as two ONNX Runtime sessions: an :class:`~clipdistill.towers.encoder.Encoder`.

    Args:
        teacher: The teacher, in float32 on the CPU.
        folder: Where the graphs go.
        threads: Of one run.
    """

    def __init__(self, teacher: Teacher, folder: Path, threads: int) -> None:
        self._teacher = teacher
        folder.mkdir(parents=True, exist_ok=True)
        batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
        pixels = teacher.transform(Image.new("RGB", (8, 8), "white"))
        tokens = teacher.tokenizer(["a photo of a red bicycle"] * EXAMPLES)
        if teacher.cuts:
            tokens = context.cut(teacher.model, tokens)
        length = {1: torch.export.Dim("length", min=1, max=512)} if teacher.cuts else {}
        with _quiet():
            image = _written(_Pictures(teacher.model), pixels.expand(EXAMPLES, -1, -1, -1), {0: batch})
            text = _written(_Texts(teacher.model), tokens, {0: batch, **length})
        self._image = _session(image, folder / "teacher_image.onnx", threads)
        self._text = _session(text, folder / "teacher_text.onnx", threads)

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return self._teacher.dim

    @property
    def fingerprint(self) -> str:
        """The teacher's."""
        return self._teacher.fingerprint

    def encode_images(self, pictures: Sequence[Picture], batch: int = 64) -> Vectors:
        """Embed pictures: float32 [pictures, dim], unit rows."""
        rows = []
        for part in _parts(pictures, batch):
            images = [decode(item.read(), self._teacher.max_pixels, item.origin) for item in part]
            rows.append(self._image.run(None, {"given": np.stack([self._teacher.transform(one) for one in images])})[0])
        return np.concatenate(rows)

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts: float32 [texts, dim], unit rows."""
        rows = []
        for part in _parts(texts, batch):
            tokens = self._teacher.tokenizer(list(part))
            tokens = context.cut(self._teacher.model, tokens) if self._teacher.cuts else tokens
            rows.append(self._text.run(None, {"given": tokens.numpy()})[0])
        return np.concatenate(rows)


class _Pictures(nn.Module):
    """Prepared pictures to unit rows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor) -> Tensor:
        return nn.functional.normalize(self.model.encode_image(given), dim=-1)


class _Texts(nn.Module):
    """Token ids to unit rows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: Tensor) -> Tensor:
        features = context.encode(self.model, given) if context.can_cut(self.model) else self.model.encode_text(given)
        return nn.functional.normalize(features, dim=-1)


def _written(module: nn.Module, example: Tensor, shape: dict[int, Any]) -> Any:
    program = torch.onnx.export(
        module.eval(),
        kwargs={"given": example.contiguous()},
        dynamo=True,
        input_names=["given"],
        output_names=["rows"],
        opset_version=OPSET,
        dynamic_shapes={"given": shape},
        verbose=False,
    )
    assert program is not None
    return program


def _session(program: Any, path: Path, threads: int) -> Any:
    program.save(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which attention is written in plain operations, and the exporter does not speak."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
