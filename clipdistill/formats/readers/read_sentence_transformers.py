"""Embed probes with sentence-transformers, texts and pictures as a user gives them."""

import json
import sys
from typing import Any

import numpy as np
import sentence_transformers
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

_BATCH = 32


@torch.inference_mode()
def main(folder: str, probes: str, out: str, precision: str) -> None:
    """Embed all probes with every tower that has some; the weights are as they were trained."""
    given, found = np.load(probes, allow_pickle=False), {}
    model: Any = SentenceTransformer(folder, device="cpu")
    texts = json.loads(given["texts"].tobytes())
    if texts:
        found["text"] = model.encode(texts, batch_size=_BATCH)
        found["input_ids"] = model.preprocess(texts)["input_ids"].numpy()
    else:
        found["text"] = _embed(model, {name: given[name] for name in ("input_ids", "attention_mask")}, "text")
    if "pixel_values" in given:
        found["image"] = _embed(model, {"pixel_values": given["pixel_values"]}, "image")
        originals = [Image.fromarray(given[name]) for name in given.files if name.startswith("original_")]
        if originals:
            found["image_prepared"] = model.encode(originals, batch_size=_BATCH)
    np.savez(out, **found)
    sys.stdout.write(sentence_transformers.__version__)


def _embed(model: Any, inputs: dict[str, Any], modality: str) -> Any:
    """Rows of inputs that are prepared already, part by part."""
    rows = len(next(iter(inputs.values())))
    parts = [
        model(
            {
                **{name: torch.from_numpy(value[at : at + _BATCH]) for name, value in inputs.items()},
                "modality": modality,
            }
        )
        for at in range(0, rows, _BATCH)
    ]
    return torch.cat([part["sentence_embedding"] for part in parts]).float().numpy()


if __name__ == "__main__":
    main(*sys.argv[1:5])
