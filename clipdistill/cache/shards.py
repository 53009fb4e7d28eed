"""Filling a folder shard by shard: a plan noted first, a note for each finished shard, the manifest last."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipdistill.cache.store import REMEDY
from clipdistill.core import files, fingerprint
from clipdistill.core.errors import MismatchError
from clipdistill.data.records import Rejection

NOTES, PLAN = "shards", "plan.json"


def check_plan(folder: Path, found: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Refuse a folder that is filled, or half filled, from other inputs.

    Raises:
        MismatchError: Naming the first field that differs and both values.
    """
    found = {"dtype": "float16", **found}  # all rows were, before there was a choice
    for field, value in plan.items():
        if found.get(field) != value:
            raise MismatchError(str(folder), f"plan.{field}", value, found.get(field), REMEDY)


def begin(folder: Path, plan: Mapping[str, Any]) -> None:
    """Take the folder for this plan: note the plan first, so that a half-filled cache is never taken for another.

    Raises:
        MismatchError: If it is taken for another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / PLAN
    if noted.exists():
        check_plan(folder, files.read_json(noted), plan)
    else:
        files.write_json(noted, plan)
    for stale in folder.rglob(f"{files.TEMPORARY}*"):
        stale.unlink()


def spans(count: int, rows: int) -> Iterator[tuple[str, int, int]]:
    """The name and span of each shard; names are padded with zeros so that they sort."""
    number_of = max(1, -(-count // rows))
    width = len(str(number_of - 1))
    for number in range(number_of):
        yield f"{number:0{width}d}", number * rows, min(count, (number + 1) * rows)


def finished(folder: Path, name: str) -> dict[str, Any] | None:
    """The note of a shard that was written whole, or None where it has to be made (again)."""
    note = folder / NOTES / f"{name}.json"
    if not note.exists():
        return None
    done: dict[str, Any] = files.read_json(note)
    whole = all(
        (folder / path).is_file() and fingerprint.of_file(folder / path) == d for path, d in done["files"].items()
    )
    return done if whole else None


def finish(folder: Path, name: str, paths: Sequence[str], rejected: Sequence[Rejection] = ()) -> dict[str, Any]:
    """Note that a shard is whole: its files with their SHA-256, and the rows that were refused."""
    done = {
        "files": {path: fingerprint.of_file(folder / path) for path in paths},
        "rejected": [asdict(row) for row in rejected],
    }
    files.write_json(folder / NOTES / f"{name}.json", done)
    return done


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of the finished shards, for the manifest."""
    notes = [files.read_json(note) for note in sorted((folder / NOTES).glob("*.json"))]
    return {path: digest for note in notes for path, digest in note["files"].items()}


def tidy(folder: Path) -> None:
    """Remove what only an unfinished cache needs."""
    shutil.rmtree(folder / NOTES, ignore_errors=True)
    (folder / PLAN).unlink(missing_ok=True)
