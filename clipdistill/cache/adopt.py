"""Adopt an embeddings folder that clip-retrieval (or any tool of its layout) made: no teacher is at hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from clipdistill.cache.store import Rows, TeacherCache
from clipdistill.core import fingerprint
from clipdistill.core.errors import DataError
from clipdistill.data.records import Pair

_PICTURE_COLUMNS = ("key", "image_path", "url")


def adopt(
    folder: str | Path,
    pairs: Sequence[Pair],
    *,
    logit_scale: float,
    logit_bias: float | None = None,
    name: str = "",
) -> TeacherCache:
    """Use stored embeddings as a teacher.

    A row belongs to the picture whose key, path, file name or file stem equals the row's ``key`` or ``image_path``; a
    name that stands in several rows identifies none of them. A text's row is the one whose ``caption`` it is.

    Args:
        folder: ``img_emb/*.npy`` and/or ``text_emb/*.npy`` beside ``metadata/*.parquet``, row for row.
        pairs: The user's data: it says which keys are wanted.
        logit_scale: exp(logit_scale) of the model that made them.
        logit_bias: Its SigLIP bias.
        name: What the model is called.

    Raises:
        DataError: If files are missing, counts differ, or rows hold values that are not finite.
    """
    folder = Path(folder)
    images, texts = _rows(folder, "img_emb"), _rows(folder, "text_emb")
    table = _metadata(folder)
    if not len(images) and not len(texts):
        raise DataError(f"{folder}: no img_emb/*.npy and no text_emb/*.npy: not an embeddings folder")
    for part, rows in (("img_emb", images), ("text_emb", texts)):
        if len(rows) and len(rows) != len(table):
            raise DataError(f"{folder}: {part} has {len(rows)} rows, metadata has {len(table)}: they must agree")
    if len(images) and len(texts) and images.dim != texts.dim:
        raise DataError(f"{folder}: img_emb is {images.dim} wide and text_emb {texts.dim}: they must agree")
    digests = {path: d for path, d in fingerprint.of_folder(folder).items() if path.endswith((".npy", ".parquet"))}
    facts = {
        "teacher": {"name": name or folder.name, "fingerprint": fingerprint.of_value(digests), "parts": {}},
        "logit_scale": logit_scale,
        "logit_bias": logit_bias,
        "files": digests,
        "adopted": True,
    }
    image_index = _picture_rows(table, pairs) if len(images) else {}
    return TeacherCache(folder, facts, [images], texts, image_index, _text_rows(table) if len(texts) else {}, {})


def _rows(folder: Path, part: str) -> Rows:
    paths = sorted((folder / part).glob("*.npy"))
    for path in paths:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
            raise DataError(f"{path}: {array.dtype} of shape {array.shape}: float16 or float32 rows are needed")
        for start in range(0, len(array), 65536):
            norms = np.linalg.norm(array[start : start + 65536].astype(np.float32), axis=1)
            if not np.isfinite(norms).all() or (norms == 0).any():
                bad = start + int(np.flatnonzero(~np.isfinite(norms) | (norms == 0))[0])
                raise DataError(f"{path}: row {bad} is zero or not finite: it cannot be made a unit vector")
    return Rows(paths)


def _metadata(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "metadata").glob("*.parquet"))
    if not paths:
        raise DataError(f"{folder}: no metadata/*.parquet: nothing says which row belongs to which picture")
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def _names(row: dict[str, Any]) -> Iterator[str]:
    """What a row may be called, the surest first; each name once."""
    given = [str(row[column]) for column in _PICTURE_COLUMNS if row.get(column)]
    yield from dict.fromkeys(alias for value in given for alias in _aliases(value))


def _aliases(name: str) -> list[str]:
    path = PurePosixPath(name.replace("\\", "/"))
    return list(dict.fromkeys([name, str(path), path.name, path.stem]))


def _picture_rows(table: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> dict[str, int]:
    counts = Counter(name for row in table for name in _names(row))
    rows = {name: number for number, row in enumerate(table) for name in _names(row) if counts[name] == 1}
    found: dict[str, int] = {}
    for pair in pairs:
        if pair.picture is None:
            continue
        path = [str(pair.picture.path)] if pair.picture.path else []
        for name in dict.fromkeys(
            [pair.key, pair.picture.origin, *path, *_aliases(pair.key), *_aliases(pair.picture.origin)]
        ):
            if name in rows:
                found[pair.key] = rows[name]
                break
    return found


def _text_rows(table: Sequence[dict[str, Any]]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for number, row in enumerate(table):
        if row.get("caption"):
            rows.setdefault(str(row["caption"]), number)
    return rows
