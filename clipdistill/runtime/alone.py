"""An encoder whose rows do not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from clipdistill.data.records import Picture
from clipdistill.towers.encoder import Encoder, Vectors


@final
class OneByOne:
    """An encoder that gives each text and picture to its network alone, so that no answer depends on its neighbours.

    An int8 graph scales its activations by the largest of the batch. Requests of strangers meet in a service's batches,
    and the same query must give the same hits whoever else asks; what is measured has to be what is served.

    Args:
        encoder: The encoder.
    """

    __slots__ = ("_encoder",)

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return self._encoder.dim

    @property
    def fingerprint(self) -> str:
        """The encoder's."""
        return self._encoder.fingerprint

    def encode_images(self, pictures: Sequence[Picture], batch: int = 1) -> Vectors:
        """Embed pictures: float32 [len(pictures), dim], unit rows; ``batch`` has no effect."""
        return self._encoder.encode_images(pictures, 1)

    def encode_texts(self, texts: Sequence[str], batch: int = 1) -> Vectors:
        """Embed texts: float32 [len(texts), dim], unit rows; ``batch`` has no effect."""
        return self._encoder.encode_texts(texts, 1)
