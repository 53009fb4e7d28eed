"""Fingerprints: SHA-256 over files, plain values and tensors, the same on every machine and in every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def of_folder(folder: Path, *, skip: Iterable[str] = ("manifest.json",)) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path inside it with forward slashes, in sorted order.

    Args:
        folder: The folder.
        skip: File names that are left out.
    """
    skipped = set(skip)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in skipped)
    return {path.relative_to(folder).as_posix(): of_file(path) for path in files}


def of_value(value: Any) -> str:
    """SHA-256 of a plain value (numbers, strings, lists, dictionaries), written as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def of_lines(lines: Iterable[str]) -> str:
    """SHA-256 of an ordered stream of strings, each ended so that no two streams look alike."""
    digest = hashlib.sha256()
    for line in lines:
        data = line.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def of_tensors(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of named torch tensors: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(_bytes_type()).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _bytes_type() -> Any:
    import torch  # only callers that hold tensors come here, so importing this module stays light

    return torch.uint8


def of_bytes(data: bytes) -> str:
    """The first 16 hexadecimal digits of the BLAKE2b of a picture's bytes: a row's content mark in the cache."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
