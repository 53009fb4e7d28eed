"""The distillation of inner blocks: a term of the sum that hooks see, with the width projections that it learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor, nn

from clipdistill.cache.blocks import fact_name
from clipdistill.core.errors import MismatchError
from clipdistill.losses.blocks import Form, block_loss
from clipdistill.losses.objective import Embeddings, ExtraTerm
from clipdistill.towers import context
from clipdistill.towers.student import DualEncoder, Side, seeded
from clipdistill.towers.tap import Pass, Tap
from clipdistill.training.batch import Batch

SIDES: tuple[Side, ...] = ("image", "text")


@dataclass(frozen=True, slots=True)
class BlockPair:
    """A block of the student, and the teacher's that it should resemble.

    Attributes:
        side: Which tower both are of.
        student: The student's module.
        teacher: The teacher's module.
        student_width: How wide the student's cells are.
        teacher_width: How wide the teacher's are.
    """

    side: Side
    student: str
    teacher: str
    student_width: int
    teacher_width: int


class TeacherCells(Protocol):
    """Where the teacher's side comes from."""

    def watching(self) -> AbstractContextManager[object]:
        """A block in which the teacher may run."""
        ...

    def cells(self, side: Side, batch: Batch) -> Mapping[str, Tensor]:
        """By block name [rows, cells, width], row for row with the batch's pictures or texts."""
        ...


@final
class StoredCells:
    """The teacher's blocks as they are stored: facts of the batch's rows."""

    def watching(self) -> AbstractContextManager[object]:
        """Nothing runs."""
        return nullcontext()

    def cells(self, side: Side, batch: Batch) -> Mapping[str, Tensor]:
        """By block name float16 [rows, cells, width]."""
        facts, prefix = batch.image_facts if side == "image" else batch.text_facts, fact_name(side, "")
        return {name.removeprefix(prefix): value for name, value in facts.items() if name.startswith(prefix)}


@final
class LiveCells:
    """The blocks of a teacher that embeds each batch just before the student does.

    Args:
        taps: On the teacher's towers.
    """

    def __init__(self, taps: Mapping[Side, Tap]) -> None:
        self._taps = dict(taps)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block in which the teacher's passes are seen."""
        with ExitStack() as stack:
            for tap in self._taps.values():
                stack.enter_context(tap.watching())
            yield

    def cells(self, side: Side, batch: Batch) -> Mapping[str, Tensor]:
        """By block name float32 [rows, cells, width] of the teacher's last pass."""
        last = self._taps[side].take()[-1]
        return {name: value.to(batch.pixels.device) for name, value in last.cells.items()}


@final
class BlockLoss:
    """What the student's blocks give should be, after a learned linear map, what the teacher's give.

    One term a tower, ``blocks_image`` and ``blocks_text``: the mean over its blocks of
    :func:`~clipdistill.losses.blocks.block_loss`. Where both widths are equal the map starts as the identity. The maps
    are trained and checkpointed with the student, and left behind: the student that is kept has none of them.

    Args:
        student: The student.
        pairs: Which blocks.
        teacher: Where the teacher's side comes from.
        weight: Of each of the two terms.
        form: Of the loss.
        cells: Parts of a picture along each axis, and spans of a text.
        seed: Decides the maps' first weights.
    """

    def __init__(
        self,
        student: DualEncoder,
        pairs: Sequence[BlockPair],
        teacher: TeacherCells,
        *,
        weight: float,
        form: Form,
        cells: int,
        seed: int,
    ) -> None:
        self._teacher, self._weight, self._form = teacher, weight, form
        self._pairs = {side: [pair for pair in pairs if pair.side == side] for side in SIDES}
        self._taps = {
            side: Tap(student.model, side, [pair.student for pair in mine], cells, trained=True)
            for side, mine in self._pairs.items()
            if mine
        }
        with seeded(seed):
            self._maps = nn.ModuleDict(
                {f"{side}_{n}": _map(pair) for side in SIDES for n, pair in enumerate(self._pairs[side])}
            )

    @property
    def learned(self) -> nn.Module:
        """The maps from the student's widths to the teacher's."""
        return self._maps

    @contextmanager
    def watching(self, student: DualEncoder) -> Iterator[None]:
        """A block in which the towers' passes are seen."""
        with ExitStack() as stack:
            stack.enter_context(self._teacher.watching())
            for tap in self._taps.values():
                stack.enter_context(tap.watching())
            yield

    def terms(self, student: DualEncoder, batch: Batch, embedded: Embeddings) -> Iterator[ExtraTerm]:
        """The terms of a batch, right after teacher and student embedded it."""
        for side, tap in self._taps.items():
            passes = tap.take()
            if not len(batch.pixels if side == "image" else batch.tokens):
                continue
            own = _in_order(student, side, batch, passes)
            theirs = self._teacher.cells(side, batch)
            losses = [
                block_loss(self._maps[f"{side}_{n}"](own[pair.student]), theirs[pair.teacher].float(), self._form)
                for n, pair in enumerate(self._pairs[side])
            ]
            yield ExtraTerm(f"blocks_{side}", self._weight, torch.stack(losses).mean())


def _map(pair: BlockPair) -> nn.Linear:
    linear = nn.Linear(pair.student_width, pair.teacher_width)
    if pair.student_width == pair.teacher_width:
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


def _in_order(student: DualEncoder, side: Side, batch: Batch, passes: Sequence[Pass]) -> dict[str, Tensor]:
    """The student's cells, row for row with the batch: texts are run in groups of like length."""
    if side == "image":
        return _pass_of(passes, batch.pixels).cells
    order = context.run_order(student.model, batch.tokens)
    mine = [_pass_of(passes, context.cut(student.model, batch.tokens[rows])).cells for rows in order]
    back = torch.cat(order).argsort()
    return {name: torch.cat([cells[name] for cells in mine])[back] for name in mine[0]}


def _pass_of(passes: Sequence[Pass], given: Tensor) -> Pass:
    """The pass over an input: another loss may have sent others through the tower, such as masked pictures.

    Raises:
        MismatchError: If there is none.
    """
    alike = [one for one in passes if one.given.shape == given.shape]
    # Comparing waits for the device, so it is done only where there is something to choose.
    found = alike if len(alike) == 1 else [one for one in alike if torch.equal(one.given, given)]
    if not found:
        shapes = [list(one.given.shape) for one in passes]
        remedy = "The blocks of a batch are taken right after the student embedded it."
        raise MismatchError("the student's blocks", "passes over the batch", list(given.shape), shapes, remedy)
    return found[0]
