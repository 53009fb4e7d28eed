"""Manifests: the file that is written last into an artefact's folder, and that a reader trusts alone."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipdistill.core import files, fingerprint
from clipdistill.core.errors import DataError, MismatchError

NAME = "manifest.json"
_LIBRARIES = ("clipdistill", "torch", "open_clip_torch", "timm", "faiss-cpu", "numpy", "pillow", "tokenizers")


def libraries() -> dict[str, str]:
    """The versions of Python and of the libraries that decide results."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def write(
    folder: Path, kind: str, version: int, values: Mapping[str, Any], digests: Mapping[str, str] | None = None
) -> None:
    """Write the manifest of a finished artefact, with the SHA-256 of each of its files.

    Args:
        folder: The artefact's folder; all its other files are whole by now.
        kind: What the artefact is: ``teacher-cache``, ``student``, ``index``.
        version: The version of the kind's format.
        values: What else the manifest says.
        digests: SHA-256 by file name where they are known; none = of every file in the folder.
    """
    body = {**values, "kind": kind, "version": version, "libraries": libraries()}
    files.write_json(
        folder / NAME, {**body, "files": fingerprint.of_folder(folder) if digests is None else dict(digests)}
    )


def read(folder: Path, kind: str | tuple[str, ...], version: int, remedy: str) -> dict[str, Any]:
    """Read the manifest of an artefact.

    Args:
        folder: The artefact's folder.
        kind: The kind that is expected, or several that are read alike.
        version: The format version that this code reads.
        remedy: What the user can do when it does not fit.

    Raises:
        DataError: If there is no manifest: the artefact was never finished, or the path is wrong.
        MismatchError: If it is another kind or version.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    try:
        manifest = files.read_json(folder / NAME)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder}: no {NAME}: this {kinds[0]} was not finished, or it is another folder. {remedy}"
        ) from None
    except ValueError as fault:
        raise DataError(f"{folder / NAME}: not readable: {fault}. {remedy}") from fault
    for field, valid in (("kind", kinds), ("version", (version,))):
        found = manifest.get(field) if isinstance(manifest, dict) else None
        if found not in valid:
            expected = valid[0] if len(valid) == 1 else " or ".join(map(str, valid))
            raise MismatchError(str(folder), field, expected, found, remedy)
    return dict(manifest)


def verify_files(folder: Path, expected: Mapping[str, str], remedy: str) -> None:
    """Compare files with their recorded SHA-256.

    Args:
        folder: The folder that the names are relative to.
        expected: SHA-256 by file name.
        remedy: What the user can do when one differs.

    Raises:
        MismatchError: If a file is missing or differs, naming it and both values.
    """
    for name, digest in expected.items():
        path = folder / name
        found = fingerprint.of_file(path) if path.is_file() else "no file"
        if found != digest:
            raise MismatchError(str(path), "sha256", digest, found, remedy)
