"""The exported student without torch: ONNX Runtime, numpy, Pillow and tokenizers."""

from clipdistill.runtime.encoder import RuntimeEncoder

__all__ = ["RuntimeEncoder"]
