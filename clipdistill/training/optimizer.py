"""AdamW over the student and its objective: who is trained, at which rate, with how much decay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from clipdistill.config import TrainConfig
from clipdistill.core.errors import ConfigError, suggest

_FUSED = ("cpu", "cuda")  # one kernel for all parameters: 6 ms a step instead of 41 for 2.5 million on one CPU core
Part = Literal["head", "image", "text", "teacher", "other"]
Named = Mapping[str, nn.Parameter]
# Tables and tokens that are no matrices of a linear map: pulling them to zero shrinks what they mark.
_LAST = {("head",), ("proj",), ("trunk", "classifier"), ("trunk", "head"), ("trunk", "fc")}  # below ``visual``
_UNDECAYED = ("positional_embedding", "pos_embed", "class_embedding", "cls_token", "cls_emb", "reg_token", "logit_")


@contextmanager
def frozen(model: nn.Module, prefixes: Sequence[str], key: str = "train.freeze") -> Iterator[list[nn.Module]]:
    """Parameters that are not trained, for a block.

    Args:
        model: Whose parameters the names are of.
        prefixes: Beginnings of parameter names.
        key: Where the configuration names them.

    Yields:
        The batch norms among the frozen modules: they must stay in eval mode, so that their statistics stay too.

    Raises:
        ConfigError: If a prefix begins no parameter's name, with the nearest names.
    """
    names = dict(model.named_parameters())
    faults = [
        f"{key}: no parameter begins with {prefix!r}; {suggest(prefix, _beginnings(names))}"
        for prefix in prefixes
        if not any(name.startswith(prefix) for name in names)
    ]
    if faults:
        raise ConfigError(faults)
    still = [
        value for name, value in names.items() if value.requires_grad and any(name.startswith(p) for p in prefixes)
    ]
    for value in still:
        value.requires_grad_(False)
    try:
        yield [part for name, part in model.named_modules() if _is_frozen_norm(name, part, prefixes)]
    finally:
        for value in still:
            value.requires_grad_(True)


def trained_parameters(module: nn.Module, objective: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer trains, by name: ``student.`` and ``objective.`` and the module's own name.

    The student's own logit scale and bias are left out: they are set from the objective's, which are trained.
    """
    student = {f"student.{name}": value for name, value in module.named_parameters()}
    scales = {f"objective.{name}": value for name, value in objective.named_parameters()}
    every = {name: value for name, value in student.items() if not name.split(".")[-1].startswith("logit_")} | scales
    return {name: value for name, value in every.items() if value.requires_grad}


def build_optimizer(parameters: Named, train: TrainConfig, teacher_lr: float | None = None) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), in groups of one rate and one decay.

    Biases, norms and scales (everything of fewer than two dimensions), position tables and class tokens do not decay.

    Args:
        parameters: What is trained, as :func:`trained_parameters` names it; a teacher's names begin with ``teacher.``.
        train: Rates, decay and betas.
        teacher_lr: The learning rate of a teacher that is trained too.
    """
    image = train.lr_image or train.lr
    rates = {"head": train.lr_head or image, "image": image, "text": train.lr_text or train.lr, "other": train.lr}
    rates["teacher"] = teacher_lr or train.lr
    groups: dict[tuple[Part, float], dict[str, Any]] = {}
    for name, value in parameters.items():
        part, decay = part_of(name), train.weight_decay if _decays(name, value) else 0.0
        group = {"params": [], "weight_decay": decay, "lr": rates[part], "full_lr": rates[part]}
        groups.setdefault((part, decay), group)["params"].append(value)
    fused = all(value.device.type in _FUSED for value in parameters.values())
    return torch.optim.AdamW([groups[key] for key in sorted(groups)], lr=train.lr, betas=train.betas, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group to a share of its full learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * share


def align_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every gradient the memory order of its parameter.

    The fused AdamW goes through both by their addresses alone, and silently mixes up elements where the orders differ.
    Autograd keeps them equal by itself; this makes sure of it.
    """
    for value in parameters:
        if value.grad is not None and value.grad.stride() != value.stride():
            value.grad = torch.empty_like(value, memory_format=torch.preserve_format).copy_(value.grad)


def part_of(name: str) -> Part:
    """The tower that a parameter belongs to, by its name; the picture tower's last layer is a part of its own."""
    words = name.split(".")
    if words[0] == "teacher":
        return "teacher"
    if words[0] != "student":
        return "other"
    if "visual" in words:
        below = tuple(words[words.index("visual") + 1 :])
        return "head" if below[:1] in _LAST or below[:2] in _LAST else "image"
    return "image" if "image" in words else "text"


def _decays(name: str, value: nn.Parameter) -> bool:
    return value.ndim >= 2 and not any(part.startswith(_UNDECAYED) for part in name.split("."))


def _is_frozen_norm(name: str, part: nn.Module, prefixes: Sequence[str]) -> bool:
    # By their common base: timm's batch norms with an activation and SyncBatchNorm are such modules as well.
    if not isinstance(part, nn.modules.batchnorm._BatchNorm):
        return False
    own = [f"{name}.{parameter}" for parameter, _ in part.named_parameters()] or [f"{name}."]
    return all(any(full.startswith(prefix) for prefix in prefixes) for full in own)


def _beginnings(names: Mapping[str, nn.Parameter]) -> set[str]:
    """All parameter names, and all the modules that they lie in."""
    pieces = [name.split(".") for name in names]
    return {".".join(parts[:length]) for parts in pieces for length in range(1, len(parts) + 1)}
