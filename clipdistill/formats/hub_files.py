"""What hub libraries read beside the weights: ``config.json``, ``preprocessor_config.json`` and the tokenizer's files.

Several layouts share one folder and these names. The tokenizer's three files are every export's
(:data:`~clipdistill.towers.tokenizer.FILES`); a ``config.json`` is written by the layout that its weights belong to,
and by others only where there is none.

CLIPImageProcessor crops an odd margin's smaller half first, where open_clip rounds it: of a picture whose resized side
is larger than the input by 3, 7, 11, ... pixels it takes the part that lies one pixel further left or up. Where
torchvision is installed it resizes with that, and a few pixels differ by a grey level. So the same picture may be
embedded a little otherwise by libraries that prepare it themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipdistill.core import files
from clipdistill.towers.preprocess import Preprocess
from clipdistill.towers.tokenizer import StudentTokenizer

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"

_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_SCALE = 1 / 255


def special_ids(tokenizer: StudentTokenizer) -> dict[str, int | None]:
    """The ids of padding, start and end under the names that a ``config.json`` has for them."""
    return {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.end_id}


def write_config(folder: Path, values: Mapping[str, Any], *, over: bool = True) -> None:
    """Write a folder's ``config.json``.

    Args:
        folder: The export, aside.
        values: The configuration.
        over: Whether one that is there is replaced: by a layout that has weights under it. One that needs only some
            configuration leaves it, so that the order of the layouts changes nothing.
    """
    if over or not (folder / CONFIG).exists():
        files.write_json(folder / CONFIG, dict(values))


def processor_faults(preprocess: Preprocess, layout: str) -> Iterator[str]:
    """Why CLIPImageProcessor, in Python and in JavaScript, cannot prepare pictures so: one sentence each.

    Args:
        preprocess: The student's preprocessing.
        layout: Which layout asks, for the sentence.
    """
    height, width = preprocess.size
    if preprocess.resize_mode == "longest":
        yield (
            f"export.layouts: {layout}: CLIPImageProcessor cannot fit a whole picture and pad around it, which this "
            f"student's preprocessing does (resize_mode longest): leave {layout} out, and use onnx"
        )
    elif preprocess.resize_mode == "shortest" and height != width:
        yield (
            f"export.layouts: {layout}: CLIPImageProcessor fills squares alone, and this student's input is "
            f"{height} x {width} px: leave {layout} out, and use onnx"
        )


def image_processor(preprocess: Preprocess) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of CLIPImageProcessor.

    Args:
        preprocess: One without :func:`processor_faults`.
    """
    height, width = preprocess.size
    squash = preprocess.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "resample": _RESAMPLE[preprocess.interpolation],
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": _SCALE,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def write_processor(folder: Path, preprocess: Preprocess) -> None:
    """Write a folder's ``preprocessor_config.json``; every layout's is the same.

    Args:
        folder: The export, aside.
        preprocess: One without :func:`processor_faults`.
    """
    files.write_json(folder / PREPROCESSOR, image_processor(preprocess))
