"""Files that are either whole or absent: write aside in the same folder, fsync, replace, fsync the folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

TEMPORARY = ".partial-"


def sync_folder(folder: Path) -> None:
    """Ask the file system to make the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Create or replace one file so that a reader sees the old one or the new one, never a part.

    Args:
        path: The file's final place.
        write: Called with a temporary path in the same folder; must write the whole file there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"
    try:
        write(aside)
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes to a file, whole or not at all."""

    def write(aside: Path) -> None:
        aside.write_bytes(data)

    write_file(path, write)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to a file, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with stable key order and two spaces of indent, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``folder`` when the block ends without an error.

    The old folder stays untouched until then. Every file is fsynced before the swap, and gets the mode that the umask
    leaves of 0666: some libraries hide what they write from everyone but its owner, who may not be the one that serves.

    Args:
        folder: The final place.

    Yields:
        An empty folder beside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{folder.name}-", dir=folder.parent))
    seen = ~_umask()
    aside.chmod(0o777 & seen)
    old = folder.parent / f"{TEMPORARY}old-{folder.name}"
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & seen)
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.replace(old)
        aside.replace(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def stays_inside(name: str) -> bool:
    """Whether a relative name leads to a file below its folder, on any operating system; symbolic links aside."""
    windows = PureWindowsPath(name)  # it takes both kinds of slashes for separators
    return bool(windows.parts) and not windows.drive and not windows.root and ".." not in windows.parts


def folder_bytes(folder: Path) -> int:
    """The total size in bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
