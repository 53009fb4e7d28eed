"""Embed probes with transformers' own CLIPModel, its tokenizer and its image processor."""

import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

_BATCH = 32


@torch.inference_mode()
def main(folder: str, probes: str, out: str, precision: str) -> None:
    """Embed all probes with both towers, texts from their spelling on; the weights are as they were trained."""
    given, found = np.load(probes, allow_pickle=False), {}
    model: Any = CLIPModel.from_pretrained(folder)
    processor = CLIPProcessor.from_pretrained(folder)
    model.eval()
    tokens: Any = {name: torch.from_numpy(given[name]) for name in ("input_ids", "attention_mask")}
    texts = json.loads(given["texts"].tobytes())
    if texts:
        tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        found["input_ids"] = tokens["input_ids"].numpy()
    parts = [
        model.get_text_features(
            input_ids=tokens["input_ids"][at : at + _BATCH], attention_mask=tokens["attention_mask"][at : at + _BATCH]
        )
        for at in range(0, len(tokens["input_ids"]), _BATCH)
    ]
    found["text"] = _unit(parts)
    pixels = torch.from_numpy(given["pixel_values"])
    found["image"] = _unit([model.get_image_features(pixel_values=part) for part in torch.split(pixels, _BATCH)])
    originals = [Image.fromarray(given[name]) for name in given.files if name.startswith("original_")]
    if originals:
        prepared = processor.image_processor(originals, return_tensors="pt")
        found["image_prepared"] = _unit([model.get_image_features(pixel_values=prepared["pixel_values"])])
    np.savez(out, **found)
    sys.stdout.write(transformers.__version__)


def _unit(parts: list[Any]) -> Any:
    """Rows of length 1 from what transformers 5 gives as the pooled output."""
    return F.normalize(torch.cat([part.pooler_output for part in parts]).float(), dim=-1).numpy()


if __name__ == "__main__":
    main(*sys.argv[1:5])
