"""Where and how the numbers of a run are computed: device, precision, threads, determinism; all put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from clipdistill.core.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
_FIRST_SCALE = 4096.0  # fp16's gradients of a contrastive loss fit below it; torch's own 65536 costs the first steps


def choose_device(name: str) -> torch.device:
    """The device of a run: ``auto`` is the first CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: If torch knows no such device, or none is there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as fault:
        raise ConfigError(f"train.device: {name!r} is not a device ({str(fault).splitlines()[0]})") from fault
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"train.device: {name!r} is asked for, but torch finds no CUDA device; use auto or cpu")
    return device


def choose_precision(wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """The precision of the towers: ``auto`` is bf16 where a CUDA device computes it, else fp32.

    Raises:
        ConfigError: If half precision is asked for on a CPU.
    """
    if device.type == "cuda":
        if wanted == "auto":
            return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        return wanted
    if wanted in ("bf16", "fp16"):
        raise ConfigError(
            f"train.precision: {wanted} on {device.type}: measured 3.4 times slower than fp32 on a CPU without AMX, "
            "and no more precise; use fp32 or auto"
        )
    return "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the towers run forward."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """The scaler that keeps fp16's small gradients; for the other precisions one that does nothing."""
    return torch.amp.GradScaler(device.type, init_scale=_FIRST_SCALE, enabled=precision == "fp16")


@contextmanager
def reproducible(device: torch.device, threads: int | None) -> Iterator[None]:
    """A block whose results depend on nothing but its inputs, the libraries and the number of threads.

    The ambient random state, the number of threads and torch's determinism switches are put back at its end. On CUDA
    an operation without a deterministic form only warns; on the CPU it is an error.

    Args:
        device: Where the block computes.
        threads: Computing threads; None leaves torch's own choice.
    """
    deterministic: Any = torch.utils.deterministic
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use, and needs it
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
            deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every buffer twice
            torch.backends.cudnn.benchmark = False
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = before[2]
            torch.backends.cudnn.benchmark = before[3]
            torch.set_num_threads(before[4])
