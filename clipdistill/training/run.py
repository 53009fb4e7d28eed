"""The live objects of one training, and what it asks of losses and callers: the loop's common ground."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clipdistill.config import TrainConfig
from clipdistill.losses.objective import Embeddings, ExtraTerm, LossTerms, Objective
from clipdistill.towers.student import DualEncoder
from clipdistill.training import numerics
from clipdistill.training.batch import Batch
from clipdistill.training.batches import BatchMaker
from clipdistill.training.budget import Plan
from clipdistill.training.folder import TrainingFolder
from clipdistill.training.live import LiveRows
from clipdistill.training.mutual import Mutual
from clipdistill.training.state import TrainingState

OnEval = Callable[[DualEncoder, int], Mapping[str, float]]
OnLog = Callable[[Mapping[str, Any]], None]


class ExtraLoss(Protocol):
    """A loss of its own beside the objective, of inner blocks or of a task."""

    @property
    def learned(self) -> nn.Module:
        """What it trains with the student and leaves behind: its parameters are optimised and checkpointed."""
        ...

    def watching(self, student: DualEncoder) -> AbstractContextManager[object]:
        """A block in which the student trains: hooks are set at its beginning, and gone at its end."""
        ...

    def terms(self, student: DualEncoder, batch: Batch, embedded: Embeddings) -> Iterator[ExtraTerm]:
        """The terms of a batch, right after the student embedded it.

        Args:
            student: The student.
            batch: On the student's device; what else is known of its rows is in its facts.
            embedded: The student's unit rows of the batch.
        """
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """The live objects of one call of :func:`distill`."""

    student: DualEncoder
    objective: Objective
    train: TrainConfig
    seed: int
    maker: BatchMaker
    state: TrainingState
    folder: TrainingFolder
    on_eval: OnEval | None
    extras: tuple[ExtraLoss, ...]
    live: LiveRows | None
    mutual: Mutual | None
    frozen_norms: list[nn.Module]
    statistics: list[Tensor]
    device: torch.device
    precision: numerics.Precision
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step gave: the losses of its parts, and the numbers that decide whether it counts."""

    terms: list[LossTerms]
    loss: float
    grad_norm: float
    teacher_loss: float
    teacher_norm: float

    @property
    def finite(self) -> bool:
        """Whether the losses and the norms of the gradients are finite numbers, the teacher's too."""
        return all(map(math.isfinite, (self.loss, self.grad_norm, self.teacher_loss, self.teacher_norm)))
