"""Views: a crop and a mirroring as data, so that the student can be shown what the teacher saw.

A view is a pure function of (seed, key, number): no state, no order, no library's random stream.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

_ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """A part of a picture, perhaps mirrored.

    Attributes:
        left: The box's left edge as a share of the picture's width.
        top: Its top edge as a share of the height.
        right: Its right edge as a share of the width.
        bottom: Its bottom edge as a share of the height.
        flip: Whether the part is mirrored left to right.
    """

    left: float
    top: float
    right: float
    bottom: float
    flip: bool


WHOLE = View(0.0, 0.0, 1.0, 1.0, False)
"""The picture as it is: view 0 of every key."""


def view(
    seed: int,
    key: str,
    number: int,
    *,
    scale: tuple[float, float] = (0.6, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> View:
    """One view of a picture: the whole for number 0, else a crop by the rule of torchvision's RandomResizedCrop.

    Area uniform in ``scale``, log aspect uniform in log ``ratio``, up to ten attempts to fit, place uniform; then the
    largest central box whose aspect is in ``ratio``. The aspect is relative to the picture's own, since the picture's
    size is not part of the function.

    Args:
        seed: The run's seed for views.
        key: The pair's key.
        number: Which view; 0 is always :data:`WHOLE`.
        scale: The least and largest share of the picture's area that is kept.
        ratio: The least and largest width over height, relative to the picture's.
        flip: The chance of mirroring.
    """
    if number == 0:
        return WHOLE
    draw = _uniforms(f"{seed}\0{key}\0{number}")
    flipped = next(draw) < flip
    for _ in range(_ATTEMPTS):
        area = _between(next(draw), *scale)
        aspect = math.exp(_between(next(draw), math.log(ratio[0]), math.log(ratio[1])))
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        left, top = next(draw), next(draw)  # drawn in every attempt, so that attempts stay independent of their result
        if width <= 1 and height <= 1:
            left, top = left * (1 - width), top * (1 - height)
            return View(left, top, left + width, top + height, flipped)
    width, height = min(1.0, ratio[1]), min(1.0, 1 / ratio[0])
    left, top = (1 - width) / 2, (1 - height) / 2
    return View(left, top, left + width, top + height, flipped)


def apply(image: Image.Image, view: View) -> Image.Image:
    """Cut a view out of a picture: the box rounded to whole pixels, one at least, then mirrored if the view says so."""
    if view == WHOLE:
        return image
    left, right = _span(view.left, view.right, image.width)
    top, bottom = _span(view.top, view.bottom, image.height)
    part = image.crop((left, top, right, bottom))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else part


def _span(low: float, high: float, pixels: int) -> tuple[int, int]:
    first = min(max(0, round(low * pixels)), pixels - 1)
    return first, min(max(first + 1, round(high * pixels)), pixels)


def _between(uniform: float, low: float, high: float) -> float:
    return low + (high - low) * uniform


def _uniforms(text: str) -> Iterator[float]:
    """Numbers in [0, 1) from a Philox keyed by the text's SHA-256: its raw words, which no numpy version may change."""
    words = np.frombuffer(hashlib.sha256(text.encode("utf-8")).digest()[:16], dtype="<u8")
    stream = np.random.Philox(key=words.astype(np.uint64))
    while True:
        yield (int(stream.random_raw()) >> 11) * 2.0**-53
