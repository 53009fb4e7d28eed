"""A step's queue: many of the teacher's stored rows, to contrast with at no teacher's cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipdistill.core.errors import ConfigError
from clipdistill.losses.batch import Embeddings
from clipdistill.training.sampler import Rows, permutation


class StoredRows(Protocol):
    """What a queue is drawn from: a teacher cache."""

    @property
    def dim(self) -> int:
        """The width of the teacher's embeddings."""
        ...

    def image_rows(self, keys: Sequence[str], views: Sequence[int]) -> npt.NDArray[np.float32]:
        """The teacher's unit rows [len(keys), dim] of these views of these pictures."""
        ...

    def text_rows(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The teacher's unit rows [len(texts), dim] of these texts."""
        ...


@final
class Queue:
    """Draws the queue of any step: a pure function of the data, the seed and the step, so nothing has to be kept.

    No row is in a step's queue twice, and none comes again before as many steps as the stored rows fill. Pictures are
    whole (view 0).

    Args:
        cache: The teacher's rows.
        keys: The pictures to draw from.
        texts: The texts to draw from.
        rows: How many pictures and how many texts a step has; where there are fewer, all of them.
        seed: The run's seed.
        images: Whether pictures are trained on, which are compared with queued texts.
        sentences: Whether texts are trained on, which are compared with queued pictures.

    Raises:
        ConfigError: If nothing that is trained on has two stored rows of the other modality to be compared with.
    """

    def __init__(
        self,
        cache: StoredRows,
        keys: Sequence[str],
        texts: Sequence[str],
        rows: int,
        seed: int,
        *,
        images: bool,
        sentences: bool,
    ) -> None:
        if not ((images and len(texts) > 1) or (sentences and len(keys) > 1)):
            raise ConfigError(
                "loss.queue compares pictures with stored texts and texts with stored pictures; the data have "
                f"{len(keys)} pictures and {len(texts)} texts. Add data of the other modality, or set loss.queue=0"
            )
        self._cache, self._keys, self._texts = cache, keys, texts
        self._images = _Shuffled("queue_images", len(keys), rows, seed)
        self._sentences = _Shuffled("queue_texts", len(texts), rows, seed)

    def draw(self, step: int) -> Embeddings:
        """The teacher's rows [drawn, dim] of a step, counted from 0, of both modalities."""
        keys = [self._keys[row] for row in self._images.draw(step)]
        texts = [self._texts[row] for row in self._sentences.draw(step)]
        return Embeddings(
            self._tensor(self._cache.image_rows(keys, [0] * len(keys)) if keys else None),
            self._tensor(self._cache.text_rows(texts) if texts else None),
        )

    def _tensor(self, rows: npt.NDArray[np.float32] | None) -> Tensor:
        return torch.tensor(np.empty((0, self._cache.dim), np.float32) if rows is None else rows, dtype=torch.float32)


@final
class _Shuffled:
    """Stored rows in an order that is new each epoch, of which a step takes the next few; a short rest is left over.

    Args:
        name: What is drawn.
        stored: How many rows there are; a single one has nothing to be compared with and is never drawn.
        rows: How many a step takes at most.
        seed: The run's seed.
    """

    def __init__(self, name: str, stored: int, rows: int, seed: int) -> None:
        self._name, self._stored, self._seed = name, stored, seed
        self._rows = min(rows, stored) if stored > 1 else 0
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def draw(self, step: int) -> list[int]:
        """The numbers of a step's rows."""
        if not self._rows:
            return []
        epoch, place = divmod(step, self._stored // self._rows)
        return [int(row) for row in self._ordered(epoch)[place * self._rows : (place + 1) * self._rows]]

    def _ordered(self, epoch: int) -> Rows:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self._stored, self._seed, self._name, epoch)
        return self._order
