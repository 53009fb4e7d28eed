"""Embed probes with ONNX Runtime alone, whole and row by row at each text's own length."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

_BATCH, _ALONE = 32, 3
_SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}


def main(folder: str, probes: str, out: str, precision: str) -> None:
    """Embed all probes with every tower that has some, and the first ones alone."""
    given, found = np.load(probes, allow_pickle=False), {}
    place = Path(folder) / "onnx"
    ids, mask = given["input_ids"], given["attention_mask"]
    text = _session(place / f"text_model{_SUFFIXES[precision]}.onnx")
    found["text"] = _embed(text, {"input_ids": ids, "attention_mask": mask})
    alone = [_cut(ids[row], mask[row]) for row in range(min(_ALONE, len(ids)))]
    found["text_alone"] = np.concatenate([text.run(None, one)[0] for one in alone])
    if "pixel_values" in given:
        pixels = given["pixel_values"]
        image = _session(place / f"vision_model{_SUFFIXES[precision]}.onnx")
        found["image"] = _embed(image, {"pixel_values": pixels})
        found["image_alone"] = np.concatenate([_embed(image, {"pixel_values": one[None]}) for one in pixels[:_ALONE]])
    np.savez(out, **found)
    sys.stdout.write(onnxruntime.__version__)


def _session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _cut(ids: Any, mask: Any) -> dict[str, Any]:
    length = int(mask.sum())
    return {"input_ids": ids[None, :length], "attention_mask": mask[None, :length]}


def _embed(session: Any, inputs: dict[str, Any]) -> Any:
    rows = len(next(iter(inputs.values())))
    parts = [{name: value[at : at + _BATCH] for name, value in inputs.items()} for at in range(0, rows, _BATCH)]
    return np.concatenate([session.run(None, part)[0] for part in parts])


if __name__ == "__main__":
    main(*sys.argv[1:5])
