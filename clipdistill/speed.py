"""How fast encoders are, side by side: each is timed in turn, several times, and the medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clipdistill.data.records import Picture
from clipdistill.towers.encoder import Encoder


@dataclass(frozen=True, slots=True)
class Speed:
    """An encoder's rates, end to end: decoding, preprocessing, tokenizing and the network.

    Attributes:
        images_per_s: Pictures a second.
        texts_per_s: Texts a second.
    """

    images_per_s: float
    texts_per_s: float


def compare_speed(
    encoders: Mapping[str, Encoder],
    pictures: Sequence[Picture],
    texts: Sequence[str],
    *,
    repeats: int = 3,
    batch: int | None = None,
) -> dict[str, Speed]:
    """Time encoders on the same pictures and texts, in turn, after a warm-up.

    Args:
        encoders: The encoders by name.
        pictures: What to embed; none = that rate is 0.
        texts: What to embed; none = that rate is 0.
        repeats: How often each is timed; the median counts.
        batch: How many go through a network at once; None = each encoder's own choice.

    Returns:
        The rates by the encoders' names.
    """

    def rates(encode: Callable[[Encoder], object], count: int) -> dict[str, float]:
        if not count:
            return dict.fromkeys(encoders, 0.0)
        seconds: dict[str, list[float]] = {name: [] for name in encoders}
        for turn in range(repeats + 1):
            for name, encoder in encoders.items():
                started = time.perf_counter()
                encode(encoder)
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
        return {name: count / statistics.median(values) for name, values in seconds.items()}

    size = {} if batch is None else {"batch": batch}
    images = rates(lambda encoder: encoder.encode_images(pictures, **size), len(pictures))
    words = rates(lambda encoder: encoder.encode_texts(texts, **size), len(texts))
    return {name: Speed(images[name], words[name]) for name in encoders}
