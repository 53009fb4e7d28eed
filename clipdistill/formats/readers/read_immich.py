"""Embed probes as immich's machine-learning service does with a model folder.

immich is no package that pip installs. This script follows the protocol of its public source (``immich_ml/models/clip``
and ``immich_ml/models/transforms.py``, November 2026); immich itself is not run.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


def main(folder: str, probes: str, out: str, precision: str) -> None:
    """Embed all probes one by one, as immich does, texts and a few pictures from their beginning on."""
    given, place = np.load(probes, allow_pickle=False), Path(folder) / "immich"
    config = _json(place / "config.json")
    text, image = (_session(place / part / "model.onnx") for part in ("textual", "visual"))
    own = int(config["own_dim"])
    texts, found = json.loads(given["texts"].tobytes()) if "texts" in given else [], {}
    ids = given["input_ids"].astype(np.int32)
    if texts:
        ids = _token_ids(place / "textual", config["text_cfg"].get("context_length", 77), texts)
        found["input_ids"] = ids
    found["text"] = _rows([text.run(None, {"text": row[None]})[0] for row in ids], own)
    found["image"] = _rows([image.run(None, {"image": one[None]})[0] for one in given["pixel_values"]], own)
    originals = [Image.fromarray(given[name]) for name in given.files if name.startswith("original_")]
    if originals:
        cfg = _json(place / "visual" / "preprocess_cfg.json")
        prepared = [image.run(None, {"image": _prepared(picture, cfg)})[0] for picture in originals]
        found["image_prepared"] = _rows(prepared, own)
    np.savez(out, **found)
    sys.stdout.write(onnxruntime.__version__)


def _token_ids(place: Path, context: int, texts: list[str]) -> Any:
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    pad = _json(place / "tokenizer_config.json")["pad_token"]
    tokenizer.enable_padding(length=context, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=context)
    return np.array([tokenizer.encode(" ".join(text.split())).ids for text in texts], np.int32)


def _prepared(picture: Image.Image, cfg: dict[str, Any]) -> Any:
    """Resize, cut and normalise: float32 [1, 3, size, size]."""
    size = cfg["size"][0] if isinstance(cfg["size"], list) else cfg["size"]
    method = Image.Resampling[cfg["interpolation"].upper()]
    mean, std = (np.array(cfg[name], np.float32) for name in ("mean", "std"))
    if cfg.get("resize_mode", "shortest") == "squash":
        cut = picture.resize((size, size), method)
    else:
        wide, high = picture.size
        target = (size, int(high / wide * size)) if wide < high else (int(wide / high * size), size)
        left, top = (int(length / 2 - size / 2) for length in target)
        cut = picture.resize(target, method).crop((left, top, left + size, top + size))
    pixels = np.asarray(cut.convert("RGB"), np.float32) / 255
    return ((pixels - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)


def _rows(parts: list[Any], own: int) -> Any:
    rows = np.concatenate(parts)
    if rows[:, own:].any():
        raise ValueError(f"the numbers after the first {own} are not all 0")
    return rows[:, :own]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main(*sys.argv[1:5])
