"""What the stages add to weight inheritance: the calibration rows, chosen out of the training data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipdistill.config import RunConfig
from clipdistill.data.pictures import decode
from clipdistill.stages.inputs import RunData
from clipdistill.towers.blueprint import INHERIT
from clipdistill.towers.inheritance.plan import Calibration

Item = TypeVar("Item")


def inherits(config: RunConfig) -> bool:
    """Whether a tower of the student is cut out of the teacher's."""
    return INHERIT in (config.student.image, config.student.text)


def calibration(
    config: RunConfig,
    data: RunData,
    transform: Callable[[Any], Any],
    tokenize: Callable[[list[str]], Any],
) -> Calibration:
    """Rows of ``data.train`` as a source takes them, ``student.inherit.calibration`` of each kind.

    Which rows are taken depends on the rows alone, not on their order: those whose key or text has the least hash.

    Args:
        config: The run's configuration.
        data: Its rows; unpaired pictures and texts stand in where ``data.train`` has none.
        transform: The source's own preprocessing, from a decoded RGB picture to float32 [3, height, width].
        tokenize: The source's own tokenizer, from texts to int64 [texts, length].
    """
    source, count = data.sets.get("train"), config.student.inherit.calibration
    pairs = source.pairs if source is not None else ()
    pictured = [pair for pair in (*pairs, *data.images) if pair.picture is not None]
    texts = dict.fromkeys([*(text for pair in pairs for text in pair.captions), *data.texts])
    chosen = [pair.picture for pair in _least(pictured, count, lambda pair: pair.key) if pair.picture is not None]
    pixels = [
        torch.as_tensor(transform(decode(picture.read(), config.data.max_pixels, picture.origin))) for picture in chosen
    ]
    words = _least(texts, count, str)
    tokens = torch.as_tensor(tokenize(words)) if words else torch.zeros(0, 1, dtype=torch.long)
    return Calibration(_stacked(pixels), tokens)


def _stacked(pixels: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(pixels)) if pixels else torch.zeros(0, 3, 1, 1)


def _least(items: Iterable[Item], count: int, name: Callable[[Item], str]) -> list[Item]:
    return sorted(items, key=lambda item: hashlib.sha256(name(item).encode("utf-8", "surrogatepass")).digest())[:count]
