"""The teacher in ONNX Runtime, float32: what a student has to be faster than when both are served in the same way.

The towers are written by torch's own exporter and optimised by ONNX Runtime as any graph is; pictures and texts go
through the teacher's own transform and tokenizer, and padding is cut away where that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import Tensor, nn

from clipdistill.data.pictures import decode
from clipdistill.data.records import Picture
from clipdistill.formats.graphs import traced
from clipdistill.towers import context
from clipdistill.towers.encoder import Vectors
from clipdistill.towers.teacher import Teacher

EXAMPLES, LARGEST_BATCH = 3, 4096


class OnnxTeacher:
    """A teacher's towers as two ONNX Runtime sessions: an :class:`~clipdistill.towers.encoder.Encoder`.

    Args:
        teacher: The teacher, in float32 on the CPU.
        threads: Of one run.
    """

    def __init__(self, teacher: Teacher, threads: int) -> None:
        self._teacher = teacher
        batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
        pixels = teacher.transform(Image.new("RGB", (8, 8), "white"))
        tokens = teacher.tokenizer(["a photo of a red bicycle"] * EXAMPLES)
        if teacher.cuts:
            tokens = context.cut(teacher.model, tokens)
        length = {1: torch.export.Dim("length", min=1, max=512)} if teacher.cuts else {}
        examples = {"given": pixels.expand(EXAMPLES, -1, -1, -1).contiguous()}
        self._image = _session(traced(_Pictures(teacher.model), examples, {"given": {0: batch}}), threads)
        self._text = _session(
            traced(_Texts(teacher.model), {"given": tokens}, {"given": {0: batch, **length}}), threads
        )

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


def _session(model: Any, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
