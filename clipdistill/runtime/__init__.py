"""The exported student without torch: ONNX Runtime, numpy, Pillow and tokenizers."""
