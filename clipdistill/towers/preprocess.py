"""The student's picture preprocessing: open_clip's evaluation transform in Pillow and numpy alone.

No torch here, so that a runtime without torch prepares pictures with this very code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipdistill.core.errors import DataError
from clipdistill.data.pictures import decode
from clipdistill.data.records import Picture

Pixels = npt.NDArray[np.uint8]
Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Above this many pixels the part that the crop throws away is not computed: a 1 x 100,000 strip would otherwise grow
# to gigabytes on its way to 224 x 224. The kept part then differs by rounding, a few grey levels where a noisy picture
# is clipped between the two passes of the resampling.
_LARGEST_INTERMEDIATE = 1 << 25
_REACH = 3  # pixels beyond an edge that a filter may look at: bicubic's are 2


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a tower's input.

    Attributes:
        size: Height and width in pixels.
        mean: Subtracted from each channel, in units where white is 1.
        std: What each channel is then divided by.
        interpolation: The resampling filter.
        resize_mode: ``shortest`` fills the square and crops the rest, ``longest`` fits the whole picture and pads,
            ``squash`` ignores the aspect.
        fill_color: The grey of the padding, 0 to 255; only ``longest`` pads.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    fill_color: int = 0

    @staticmethod
    def from_open_clip(cfg: Mapping[str, Any]) -> Preprocess:
        """Read open_clip's ``preprocess_cfg``: a missing key has open_clip's default.

        Raises:
            DataError: If a value is one that open_clip has no transform for.
        """
        size: Any = cfg.get("size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        interpolation: Any = cfg.get("interpolation") or "bicubic"
        if interpolation == "random":  # open_clip: random in training, bicubic in evaluation
            interpolation = "bicubic"
        mode: Any = cfg.get("resize_mode") or "shortest"
        _check("interpolation", interpolation, get_args(Interpolation))
        _check("resize_mode", mode, get_args(ResizeMode))
        _check("mode", cfg.get("mode", "RGB"), ("RGB",))
        return Preprocess(
            size=(int(height), int(width)),
            mean=_three(cfg.get("mean") or OPENAI_MEAN),
            std=_three(cfg.get("std") or OPENAI_STD),
            interpolation=interpolation,
            resize_mode=mode,
            fill_color=int(cfg.get("fill_color") or 0),
        )

    def to_open_clip(self) -> dict[str, Any]:
        """The same as open_clip's ``preprocess_cfg``, in values that JSON keeps."""
        return {
            "size": list(self.size),
            "mode": "RGB",
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            "fill_color": self.fill_color,
        }

    def pixels(self, image: Image.Image) -> Pixels:
        """Resize and crop a decoded RGB picture.

        Equal to open_clip's transform wherever that has an answer. Where it has none, because ``longest`` would shrink
        the short edge to nothing, that edge is kept one pixel wide.

        Args:
            image: An RGB picture of any size.

        Returns:
            uint8 of shape [height, width, 3].
        """
        if self.resize_mode == "squash":
            return _array(image.resize(self.size[::-1], self._filter))
        if self.resize_mode == "longest":
            return _centred(_array(image.resize(self._fitted(image)[::-1], self._filter)), self.size, self.fill_color)
        height, width = self._filled(image)
        if height * width > _LARGEST_INTERMEDIATE:
            return _array(self._only_centre(image, height, width))
        return _centred(_array(image.resize((width, height), self._filter)), self.size, 0)

    def normalise(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Scale to 0 to 1, subtract the mean, divide by the deviation, and put the channels first.

        The same float32 operations in the same order as torchvision's ToTensor and Normalize, hence the same bits.

        Args:
            pixels: uint8 of shape [..., height, width, 3].

        Returns:
            float32 of shape [..., 3, height, width], contiguous.
        """
        values = np.moveaxis(pixels, -1, -3).astype(np.float32, order="C")
        values /= np.float32(255)
        values -= np.asarray(self.mean, np.float32)[:, None, None]
        values /= np.asarray(self.std, np.float32)[:, None, None]
        return values

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Prepare one decoded RGB picture: float32 of shape [3, height, width], as open_clip's evaluation transform."""
        return self.normalise(self.pixels(image))

    def read(self, pictures: Sequence[Picture], max_pixels: int) -> npt.NDArray[np.float32]:
        """Read, decode and prepare pictures: the one way from a file to a tower, with torch and without.

        Args:
            pictures: At least one.
            max_pixels: Pictures that claim more are refused.

        Returns:
            float32 of shape [pictures, 3, height, width].

        Raises:
            DataError: If a picture cannot be read or decoded, naming it.
        """
        return self.normalise(np.stack([self.pixels(_decoded(picture, max_pixels)) for picture in pictures]))

    @property
    def _filter(self) -> Image.Resampling:
        # open_clip passes no interpolation on for a shortest-edge resize to a size that is not square
        if self.resize_mode == "shortest" and self.size[0] != self.size[1]:
            return Image.Resampling.BICUBIC
        return _FILTERS[self.interpolation]

    def _fitted(self, image: Image.Image) -> tuple[int, int]:
        ratio = max(image.height / self.size[0], image.width / self.size[1])
        return max(1, round(image.height / ratio)), max(1, round(image.width / ratio))

    def _filled(self, image: Image.Image) -> tuple[int, int]:
        """Height and width that just cover the target: cut off for a square (torchvision), else rounded (open_clip)."""
        height, width = self.size
        if height != width:
            ratio = min(image.height / height, image.width / width)
            return round(image.height / ratio), round(image.width / ratio)
        if image.width <= image.height:
            return int(height * image.height / image.width), height
        return height, int(height * image.width / image.height)

    def _only_centre(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """What the crop keeps of the picture resized to height x width, from no more rows and columns than it needs."""
        filled, pixels = (height, width), (image.height, image.width)
        top, left = _offsets(filled, self.size)
        (y0, y1), (x0, x1) = (
            (start * whole / full, (start + kept) * whole / full)
            for start, kept, whole, full in zip((top, left), self.size, pixels, filled, strict=True)
        )
        reach = [math.ceil(_REACH * max(1.0, whole / full)) for whole, full in zip(pixels, filled, strict=True)]
        up, low = max(0, math.floor(y0) - reach[0]), min(image.height, math.ceil(y1) + reach[0])
        near, far = max(0, math.floor(x0) - reach[1]), min(image.width, math.ceil(x1) + reach[1])
        part = image.crop((near, up, far, low))
        # across and then down, as Pillow does with the whole strip; given both at once it may choose the other order
        part = part.resize((self.size[1], part.height), self._filter, box=(x0 - near, 0, x1 - near, part.height))
        return part.resize(self.size[::-1], self._filter, box=(0, y0 - up, self.size[1], y1 - up))


def _decoded(picture: Picture, max_pixels: int) -> Image.Image:
    try:
        data = picture.read()
    except OSError as fault:
        raise DataError(f"{picture.origin}: cannot be read: {fault.strerror or fault}") from fault
    return decode(data, max_pixels, picture.origin)


def _check(field: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        raise DataError(f"preprocess_cfg.{field}: {value!r} is not supported; valid: {', '.join(valid)}")


def _three(value: Any) -> tuple[float, float, float]:
    numbers = list(value) if isinstance(value, Sequence) else [value] * 3
    if len(numbers) != 3:
        raise DataError(f"preprocess_cfg: three numbers are needed for RGB, got {numbers}")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def _array(image: Image.Image) -> Pixels:
    return np.array(image, np.uint8)  # a copy: Pillow's own buffer is read-only


def _offsets(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    return round((size[0] - target[0]) / 2.0), round((size[1] - target[1]) / 2.0)


def _centred(pixels: Pixels, size: tuple[int, int], fill: int) -> Pixels:
    """Pad what is too small and cut what is too large, equally on both sides, the odd pixel right and below."""
    missing = [max(0, wanted - found) for wanted, found in zip(size, pixels.shape[:2], strict=True)]
    if any(missing):
        margins = [(gap // 2, (gap + 1) // 2) for gap in missing]
        pixels = np.pad(pixels, [*margins, (0, 0)], constant_values=fill)
    found = (pixels.shape[0], pixels.shape[1])
    top, left = _offsets(found, size)
    return np.ascontiguousarray(pixels[top : top + size[0], left : left + size[1]])
