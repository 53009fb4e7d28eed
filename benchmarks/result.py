"""The shape of a benchmark's result: figures and bars by name, with the machine, the versions, seeds and the date."""

from __future__ import annotations

import datetime as dt
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from clipdistill.core import files, manifest

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(
    name: str,
    figures: dict[str, float],
    bars: dict[str, dict[str, float]],
    *,
    seeds: list[int],
    seconds: float,
    command: str,
    compared: Mapping[str, list[str]] | None = None,
) -> Path:
    """Write ``results/NAME.json``; a bar is ``{"at_least": x}`` or ``{"at_most": x}``.

    Where several things are compared, ``compared`` has their ``names`` and the ``figures`` of each: a figure is then
    ``NAME_FIGURE``, with the ends of its interval as ``NAME_FIGURE_low`` and ``NAME_FIGURE_high``.
    """
    path = RESULTS / f"{name}.json"
    result = {
        "figures": figures,
        "bars": bars,
        "machine": machine(),
        "versions": manifest.libraries(),
        "seeds": seeds,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "seconds": round(seconds, 1),
        "command": command,
        **({} if compared is None else {"compared": dict(compared)}),
    }
    files.write_json(path, result)
    return path


def tell(log: logging.Logger, figures: Mapping[str, float], bars: Mapping[str, Mapping[str, float]]) -> None:
    """Say the figures, each beside its bar."""
    for name, value in figures.items():
        bar = "".join(f"  ({side.replace('_', ' ')} {bound:g})" for side, bound in bars.get(name, {}).items())
        log.info("%s: %s%s", name, value, bar)


def machine() -> str:
    """The machine in words, without its name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (
        f"{os.cpu_count()} cores of {_processor()}, {memory:.0f} GiB, {platform.system()}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, no GPU"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
