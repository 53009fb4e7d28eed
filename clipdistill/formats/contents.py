"""What an export's folder holds: exactly the files that its manifest lists, and an index of its own student."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipdistill.core import files, manifest
from clipdistill.core.errors import DataError, MismatchError
from clipdistill.retrieval.index import FILES, FOLDER, VectorIndex

INDEX_FILES = tuple(f"{FOLDER}/{name}" for name in FILES)


def check_contents(folder: Path, digests: Mapping[str, Any], remedy: str) -> None:
    """Refuse a folder that holds more, less or other than its manifest lists, before any consumer reads a file of it.

    Args:
        folder: The export.
        digests: SHA-256 by the files' paths inside it.
        remedy: What the user can do next.

    Raises:
        DataError: If the manifest names a file outside the folder, or gives a name no SHA-256.
        MismatchError: If a file is missing or is not the one that was written, is not listed, or is a symbolic link.
    """
    for name, digest in digests.items():
        if not files.stays_inside(name):
            raise DataError(
                f"{folder / manifest.NAME}: files: {name!r} is not the name of a file inside the folder. {remedy}"
            )
        if not isinstance(digest, str):
            raise DataError(f"{folder / manifest.NAME}: files: {name}: {digest!r} is no SHA-256. {remedy}")
    _refuse_strangers(folder, {*digests, manifest.NAME}, remedy)
    manifest.verify_files(folder, digests, remedy)


def _refuse_strangers(folder: Path, listed: set[str], remedy: str) -> None:
    """Refuse what could be read in place of a listed file, or beside them: links, and files without a SHA-256."""
    for place, below, names in os.walk(folder):
        for path in sorted(Path(place) / name for name in (*below, *names)):
            if path.is_symlink():
                raise MismatchError(str(path), "kind", "a file of its own", "a symbolic link", remedy)
            if not path.is_dir() and path.relative_to(folder).as_posix() not in listed:
                advice = f"Take it out of the folder. {remedy}"
                raise MismatchError(str(path), "place in the manifest", "a SHA-256", "none", advice)


def copied_index(source: Path, folder: Path, encoder: str) -> VectorIndex:
    """Put a copy of an index into an export, after its own files were proved.

    Args:
        source: The index's folder.
        folder: The export, aside; gets ``index/``.
        encoder: The fingerprint that the index must carry.

    Raises:
        DataError: If the source is no index.
        MismatchError: If another encoder made the index, with both fingerprints, or a file is not the one that was
            written.
    """
    index = VectorIndex.load(source, encoder=encoder)
    (folder / FOLDER).mkdir()
    for name in FILES:
        shutil.copyfile(source / name, folder / FOLDER / name)
    return index


def index_facts(index: VectorIndex | None) -> dict[str, Any] | None:
    """What the export's manifest says of its index; None where it has none."""
    return None if index is None else {"vectors": len(index), "factory": index.factory, "encoder": index.encoder}
