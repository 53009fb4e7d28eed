"""What changes while a run trains, and how it becomes a checkpoint and comes back from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from clipdistill.core.errors import MismatchError
from clipdistill.data.records import Rejection
from clipdistill.training.checkpoint import Checkpoint

_OPTIMIZER = ("step", "exp_avg", "exp_avg_sq")
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Best:
    """The best student so far.

    Attributes:
        step: How many steps it had.
        score: What the evaluation gave it; None where none was asked for, and it is simply the last.
        weights: Its parameters and buffers, on the CPU.
        teacher: Those of the teacher that was trained with it, at the same step; None where it is not trained.
    """

    step: int
    score: float | None
    weights: Tensors
    teacher: Tensors | None = None


@final
class Average:
    """An exponential moving average of a module's weights: ``a = d a + (1 - d) w`` (Polyak & Juditsky 1992).

    The decay of step n is ``min(d, (1 + n) / (10 + n))``, so that a short run does not average in its beginning. The
    buffers (statistics of BatchNorm) are averaged too; those of whole numbers are copied.

    Args:
        module: What to average.
        decay: d.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self.weights = copy_of(module)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the module's weights after a step, counted from 0."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, value in self._module.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, share)
            else:
                self.weights[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with the averaged weights, for a block."""
        own = copy_of(self._module)
        self._module.load_state_dict(self.weights)
        try:
            yield
        finally:
            self._module.load_state_dict(own)


@dataclass(slots=True)
class TrainingState:
    """Everything that a resumed run needs to go on bit for bit.

    Attributes:
        module: The student's network.
        objective: The losses, with what they learn.
        optimizer: AdamW.
        names: The name of each parameter that the optimizer trains.
        scaler: fp16's gradient scaler, or one that does nothing.
        average: The moving average, or None.
        teacher: The teacher's network where it is trained too, or None.
        step: How many steps are done.
        skipped: How many of them were skipped because something was not finite.
        best: The best student so far.
        rejected: The pictures that could not be read, by key.
    """

    module: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    names: dict[nn.Parameter, str]
    scaler: torch.amp.GradScaler
    average: Average | None = None
    teacher: nn.Module | None = None
    step: int = 0
    skipped: int = 0
    best: Best | None = None
    rejected: dict[str, Rejection] = field(default_factory=dict)

    def to_checkpoint(self) -> Checkpoint:
        """The state as named tensors and plain values."""
        tensors: dict[str, Mapping[str, Tensor]] = {
            "model": self.module.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": _optimizer_tensors(self.optimizer, self.names),
        }
        rejected = [asdict(rejection) for rejection in self.rejected.values()]
        scaler = self.scaler.state_dict()
        values: dict[str, Any] = {"skipped": self.skipped, "rejected": rejected, "scaler": scaler, "best": None}
        if self.average is not None:
            tensors["average"] = self.average.weights
        if self.teacher is not None:
            tensors["teacher"] = self.teacher.state_dict()
        if self.best is not None:
            tensors["best"] = self.best.weights
            tensors |= {} if self.best.teacher is None else {"best_teacher": self.best.teacher}
            values["best"] = {"step": self.best.step, "score": self.best.score}
        return Checkpoint(self.step, tensors, values)

    def restore(self, checkpoint: Checkpoint, name: str) -> None:
        """Take over a checkpoint's state.

        Args:
            checkpoint: What to take over.
            name: How a message names it.

        Raises:
            MismatchError: If it is of another student, objective or optimizer.
        """
        further = {"average": self.average, "teacher": self.teacher}
        kinds = {"model", "objective", "optimizer", *(kind for kind, held in further.items() if held is not None)}
        _same(name, "kinds of state", kinds, set(checkpoint.tensors) - {"best", "best_teacher"})
        _load(self.module, checkpoint.tensors["model"], f"{name} (model)")
        _load(self.objective, checkpoint.tensors["objective"], f"{name} (objective)")
        _load_optimizer(self.optimizer, self.names, checkpoint.tensors["optimizer"], f"{name} (optimizer)")
        if self.average is not None:
            for key, value in checkpoint.tensors["average"].items():
                self.average.weights[key].copy_(value)
        if self.teacher is not None:
            _load(self.teacher, checkpoint.tensors["teacher"], f"{name} (teacher)")
        self.scaler.load_state_dict(checkpoint.values["scaler"])
        self.step, self.skipped = checkpoint.step, int(checkpoint.values["skipped"])
        self.rejected = {values["key"]: Rejection(**values) for values in checkpoint.values["rejected"]}
        best = checkpoint.values["best"]
        self.best = None
        if best:
            theirs = checkpoint.tensors.get("best_teacher")
            weights = dict(checkpoint.tensors["best"])
            self.best = Best(best["step"], best["score"], weights, None if theirs is None else dict(theirs))


def copy_of(module: nn.Module, device: torch.device | str | None = None) -> Tensors:
    """A copy of a module's parameters and buffers, on its own device or another."""
    return {name: value.detach().to(device or value.device, copy=True) for name, value in module.state_dict().items()}


def _load(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    _same(name, "names and shapes of tensors", _shapes(module.state_dict()), _shapes(tensors))
    module.load_state_dict(dict(tensors))


def _shapes(tensors: Mapping[str, Tensor]) -> set[str]:
    return {f"{name} {list(value.shape)}" for name, value in tensors.items()}


def _same(name: str, what: str, expected: set[str], found: set[str]) -> None:
    if expected != found:
        missing, surplus = sorted(expected - found)[:5], sorted(found - expected)[:5]
        remedy = "The checkpoint is of another student or configuration: train in another folder, or from the start."
        raise MismatchError(name, what, missing or "no more", surplus or "fewer", remedy)


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> Tensors:
    tensors: Tensors = {}
    for parameter, name in names.items():
        state = optimizer.state.get(parameter) or {}  # a parameter that never had a gradient has none yet
        tensors |= {f"{name}:{kind}": state[kind] for kind in _OPTIMIZER if kind in state}
    return tensors


def _load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor], name: str
) -> None:
    known = {f"{parameter}:{kind}" for parameter in names.values() for kind in _OPTIMIZER}
    _same(name, "names of trained parameters", set(), set(tensors) - known)
    optimizer.state.clear()
    for parameter, own in names.items():
        if f"{own}:step" not in tensors:
            continue
        state: dict[str, Any] = {"step": tensors[f"{own}:step"].clone()}
        for kind in _OPTIMIZER[1:]:
            # In the parameter's own memory format: AdamW reads both side by side.
            state[kind] = torch.empty_like(parameter, memory_format=torch.preserve_format).detach()
            state[kind].copy_(tensors[f"{own}:{kind}"])
        optimizer.state[parameter] = state
