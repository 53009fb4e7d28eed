"""Checkpoints: folders of safetensors and JSON that are whole or absent, bound to the run that wrote them.

``checkpoints/step-00000200/`` holds one safetensors file a kind of state, ``state.json`` with the plain values, and
``manifest.json`` with the SHA-256 of each. Nothing is pickled, so a checkpoint from elsewhere cannot run code.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipdistill.core import files, manifest
from clipdistill.core.errors import DataError, MismatchError

KIND, VERSION = "checkpoint", 1
KEPT = 2
"""How many checkpoints are kept: a damaged one must have an older one to fall back to."""
_REMEDY = "Train in another folder, or from the start with --force."
_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_log = logging.getLogger("clipdistill")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a run goes on from.

    Attributes:
        step: How many steps are done.
        tensors: By kind of state, by name.
        values: Plain values that JSON keeps.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]

    def copy(self) -> Checkpoint:
        """The same with tensors of its own, which no further step changes."""
        tensors = {
            kind: {name: value.detach().clone() for name, value in parts.items()}
            for kind, parts in self.tensors.items()
        }
        return Checkpoint(self.step, tensors, deepcopy(dict(self.values)))


def save(folder: Path, checkpoint: Checkpoint, fingerprint: str) -> Path:
    """Write a checkpoint whole or not at all, and remove all but the newest :data:`KEPT`.

    Args:
        folder: Where the run's checkpoints are.
        checkpoint: What to write.
        fingerprint: Of the run: its configuration, its data, its cache.

    Returns:
        The checkpoint's own folder.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    with files.replaced_folder(final) as aside:
        for kind, tensors in checkpoint.tensors.items():
            # Copies in plain order: safetensors refuses tied weights and any memory format but the contiguous one.
            plain = {
                name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for name, value in tensors.items()
            }
            save_file(plain, aside / f"{kind}.safetensors")
        files.write_json(aside / _STATE, dict(checkpoint.values))
        manifest.write(aside, KIND, VERSION, {"step": checkpoint.step, "fingerprint": fingerprint})
    for old in folders(folder)[KEPT:]:
        shutil.rmtree(old)
    return final


def newest(folder: Path, fingerprint: str) -> Checkpoint | None:
    """Read the newest whole checkpoint of a run.

    A damaged one is removed with a warning, and the one before it is tried.

    Args:
        folder: Where the run's checkpoints are.
        fingerprint: Of the run that wants to go on.

    Returns:
        The checkpoint, or None where there is no whole one.

    Raises:
        MismatchError: If a checkpoint of another run, or of another format, is found.
    """
    _tidy(folder)
    for path in folders(folder):
        try:
            return _read(path, fingerprint)
        except _DamagedError as fault:
            _log.warning("checkpoint %s is damaged and is removed; going back to the one before it. %s", path, fault)
            shutil.rmtree(path)
    return None


def folders(folder: Path) -> list[Path]:
    """The checkpoints' folders, the newest first."""
    found = [(int(name[1]), path) for path in folder.glob("step-*") if (name := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


class _DamagedError(Exception):
    """A checkpoint whose files are not what its manifest says, or that has none."""


def _read(path: Path, fingerprint: str) -> Checkpoint:
    try:
        values = manifest.read(path, KIND, VERSION, _REMEDY)
    except DataError as fault:
        raise _DamagedError(str(fault)) from fault
    if values.get("fingerprint") != fingerprint:
        raise MismatchError(str(path), "fingerprint", fingerprint, values.get("fingerprint"), _REMEDY)
    try:
        manifest.verify_files(path, values["files"], "")
        tensors = {Path(name).stem: load_file(path / name) for name in values["files"] if name.endswith(".safetensors")}
        return Checkpoint(int(values["step"]), tensors, dict(files.read_json(path / _STATE)))
    except (MismatchError, KeyError, OSError, ValueError) as fault:
        raise _DamagedError(str(fault)) from fault


def _tidy(folder: Path) -> None:
    """Remove what a killed process had not finished."""
    for path in folder.glob(f"{files.TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
