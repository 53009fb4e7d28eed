"""The layout ``vectors``: in ``vectors/`` the student's embeddings of the run's pictures, as clip-retrieval lays them.

Row for row: ``img_emb/img_emb_0.npy`` and ``text_emb/text_emb_0.npy`` in float16, and ``metadata/metadata_0.parquet``
with the pictures' keys and captions. clip-retrieval, autofaiss and ``teacher.embeddings`` read it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipdistill.core.errors import DataError
from clipdistill.data.embeddings import write_rows, write_table
from clipdistill.data.records import Pair
from clipdistill.formats.probe import Rows
from clipdistill.towers.student import DualEncoder

FOLDER = "vectors"
_FILES = {"image": "img_emb/img_emb_0.npy", "text": "text_emb/text_emb_0.npy"}
_TABLE, _CHECK = "metadata/metadata_0.parquet", "check.npz"
PATHS = tuple(f"{FOLDER}/{name}" for name in (*_FILES.values(), _TABLE, _CHECK))
_CHECKS = 8


@dataclass(frozen=True)
class Stored:
    """Rows that a reader must find in the folder.

    Attributes:
        count: How many rows the folder has.
        places: Which of them these are [rows].
        keys: Their names.
        rows: By tower, as the student embeds them: unit rows.
    """

    count: int
    places: npt.NDArray[np.int64]
    keys: tuple[str, ...]
    rows: Rows


def vectors_faults(student: DualEncoder) -> Iterator[str]:
    """Why there would be nothing to write of a student."""
    if student.preprocess is None:
        yield (
            "export.layouts: vectors holds pictures' embeddings, and this student is a text tower alone: leave vectors "
            "out. Its teacher's cache has that layout"
        )


def write_vectors(student: DualEncoder, folder: Path, pairs: Sequence[Pair]) -> Stored:
    """Write the embeddings of pictures and of their first captions.

    A picture without a caption has the empty text's embedding in ``text_emb``, so that the rows stay side by side.

    Args:
        student: A student without :func:`vectors_faults`.
        folder: The export, aside; gets ``vectors/``.
        pairs: Each with a picture.

    Returns:
        All rows, before they were rounded to float16.

    Raises:
        DataError: If a picture cannot be decoded.
    """
    captions = [pair.captions[0] if pair.captions else "" for pair in pairs]
    rows = {
        "image": student.encode_images([pair.picture for pair in pairs if pair.picture is not None]),
        "text": student.encode_texts(captions),
    }
    for tower, name in _FILES.items():
        write_rows(folder / FOLDER / name, rows[tower], "float16")
    keys = [pair.key for pair in pairs]
    columns: dict[str, list[Any]] = {"key": keys, "image_path": keys, "caption": captions}
    write_table(folder / FOLDER / _TABLE, {**columns, "captions": [list(pair.captions) for pair in pairs]})
    stored = Stored(len(pairs), np.arange(len(pairs)), tuple(keys), rows)
    _write_check(stored, folder / FOLDER / _CHECK)
    return stored


def _write_check(stored: Stored, path: Path) -> None:
    """A few rows in float32, evenly from the first to the last: the folder can then be checked without its student."""
    places = np.unique(np.linspace(0, stored.count - 1, _CHECKS).astype(np.int64))
    keys = json.dumps([stored.keys[place] for place in places]).encode("utf-8")
    parts: dict[str, Any] = {tower: rows[places] for tower, rows in stored.rows.items()}
    np.savez(path, count=np.int64(stored.count), places=places, keys=np.frombuffer(keys, np.uint8), **parts)


def read_stored(folder: Path) -> Stored:
    """The few rows that travel with the folder in float32.

    Args:
        folder: The export.

    Raises:
        DataError: If the file is not what :func:`write_vectors` writes.
    """
    path = folder / FOLDER / _CHECK
    try:
        with np.load(path, allow_pickle=False) as parts:
            keys = tuple(map(str, json.loads(parts["keys"].tobytes())))
            stored = Stored(int(parts["count"]), parts["places"], keys, {tower: parts[tower] for tower in _FILES})
        whole = {len(keys), len(stored.places), *map(len, stored.rows.values())} == {len(keys)}
        if not whole or not all(0 <= place < stored.count for place in stored.places):
            raise ValueError("its parts do not fit each other")
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as fault:
        raise DataError(f"{path}: holds no rows: {fault}. Export again: clipdistill export RUN.toml") from fault
    return stored


VECTORS_USE = (
    "clip-retrieval and autofaiss: `vectors/` has their layout, float16, one row a picture with its first caption "
    "(`key` and `image_path` are the run's names of the pictures): `autofaiss build_index --embeddings "
    "FOLDER/vectors/img_emb ...`, `clip-retrieval index --embeddings_folder FOLDER/vectors ...`. Their libraries need "
    "older versions of numpy and pandas than clipdistill, so the gate read the files as they do, with numpy and pandas."
)
