"""An encoder made of another: fewer of its dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from clipdistill.core.errors import ConfigError
from clipdistill.data.records import Picture
from clipdistill.towers.encoder import Encoder, Vectors


@final
class Leading:
    """The first entries of an encoder's embeddings, made unit again: for a student that was trained for such widths.

    Args:
        encoder: The encoder.
        dim: How many entries.

    Raises:
        ConfigError: If there are not more of them.
    """

    __slots__ = ("_encoder", "dim")

    def __init__(self, encoder: Encoder, dim: int) -> None:
        if not 1 <= dim < encoder.dim:
            raise ConfigError(f"--dim {dim}: must be from 1 to {encoder.dim - 1}, as the embeddings have {encoder.dim}")
        self._encoder = encoder
        self.dim = dim
        """How many entries."""

    @property
    def fingerprint(self) -> str:
        """The encoder's, with the width: an index of whole embeddings is another's."""
        return f"{self._encoder.fingerprint}, leading {self.dim}"

    def encode_images(self, pictures: Sequence[Picture], batch: int = 64) -> Vectors:
        """Embed pictures: float32 [len(pictures), dim], unit rows."""
        return self.cut(self._encoder.encode_images(pictures, batch))

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts: float32 [len(texts), dim], unit rows."""
        return self.cut(self._encoder.encode_texts(texts, batch))

    def cut(self, rows: Vectors) -> Vectors:
        """Whole embeddings [rows, whole width], cut: float32 [rows, dim], unit rows."""
        short = np.asarray(rows[:, : self.dim], np.float32)
        return np.asarray(short / np.linalg.norm(short, axis=1, keepdims=True).clip(min=1e-12), np.float32)
