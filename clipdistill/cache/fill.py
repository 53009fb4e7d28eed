"""Fill a teacher cache shard by shard; a kill at any moment loses at most the shard in hand."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from clipdistill.cache import shards
from clipdistill.cache.store import KIND, VERSION, Dtype, TeacherCache, Views, image_folder
from clipdistill.core import fingerprint, manifest
from clipdistill.core.progress import Advance, progress
from clipdistill.data import embeddings
from clipdistill.data.pictures import PictureError, decode
from clipdistill.data.records import Pair, Rejection
from clipdistill.data.views import apply
from clipdistill.towers.encoder import Vectors

_log = logging.getLogger("clipdistill")


class FillingTeacher(Protocol):
    """What filling a cache needs of a teacher."""

    name: str
    dim: int
    max_pixels: int

    @property
    def scale(self) -> float:
        """exp(logit_scale)."""
        ...

    @property
    def bias(self) -> float | None:
        """SigLIP's logit bias."""
        ...

    @property
    def parts(self) -> dict[str, str]:
        """SHA-256 of weights, preprocessing and tokenizer."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding."""
        ...

    def encode_decoded(self, images: Sequence[Image.Image]) -> Vectors:
        """Embed decoded pictures as one batch."""
        ...

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts."""
        ...

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens a text, to group texts of equal cost."""
        ...


def fill(
    folder: str | Path,
    teacher: FillingTeacher,
    pairs: Sequence[Pair],
    texts: Sequence[str] = (),
    *,
    views: Views | None = None,
    shard_rows: int = 4096,
    batch: int = 64,
    dtype: Dtype = "float16",
) -> TeacherCache:
    """Embed every picture in every view, and every unique text once; go on where a killed run stopped.

    Args:
        folder: The cache's folder.
        teacher: The live teacher.
        pairs: Whose pictures and captions; unpaired pictures are pairs without captions.
        texts: Unpaired texts.
        views: How the views are drawn; none = the whole pictures alone.
        shard_rows: Pictures or texts a shard. The bytes that are written depend on it and on ``batch``.
        batch: Pictures a forward pass.
        dtype: The precision of the stored rows.

    Returns:
        The finished cache.

    Raises:
        MismatchError: If the folder holds a cache, or part of one, of other inputs.
    """
    folder = Path(folder)
    drawn = views or Views()
    pictures = [pair for pair in pairs if pair.picture is not None]
    words = list(dict.fromkeys([*(text for pair in pairs for text in pair.captions), *texts]))
    plan = _plan(teacher, pictures, words, drawn, shard_rows, batch, dtype)
    if (folder / manifest.NAME).exists():
        shards.check_plan(folder, TeacherCache.open(folder, verify=False).facts["plan"], plan)
        shards.tidy(folder)
        return TeacherCache.open(folder)
    shards.begin(folder, plan)
    started = time.monotonic()
    rejected = _fill_pictures(folder, teacher, pictures, drawn, shard_rows, batch, dtype)
    _fill_texts(folder, teacher, words, shard_rows, dtype)
    facts = {
        "plan": plan,
        "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint, "parts": teacher.parts},
        "logit_scale": teacher.scale,
        "logit_bias": teacher.bias,
        "dim": teacher.dim,
        "dtype": dtype,
        "views": drawn.to_json(),
        "pictures": len(pictures) - len(rejected),
        "texts": len(words),
        "rejected": [asdict(row) for row in rejected],
    }
    manifest.write(folder, KIND, VERSION, facts, shards.digests(folder))
    shards.tidy(folder)
    _log.info(
        "teacher cache: %d pictures, %d texts in %.0f s", facts["pictures"], len(words), time.monotonic() - started
    )
    return TeacherCache.open(folder, verify=False)


def planned_bytes(pictures: int, texts: int, dim: int, views: int, dtype: Dtype = "float16") -> int:
    """The size in bytes of the embeddings that a cache will hold."""
    return np.dtype(dtype).itemsize * dim * (pictures * views + texts)


def _plan(
    teacher: FillingTeacher,
    pictures: Sequence[Pair],
    words: Sequence[str],
    views: Views,
    shard_rows: int,
    batch: int,
    dtype: Dtype,
) -> dict[str, Any]:
    return {
        "teacher": teacher.fingerprint,
        "pictures": fingerprint.of_lines(pair.key for pair in pictures),
        "texts": fingerprint.of_lines(words),
        "views": views.to_json(),
        "shard_rows": shard_rows,
        "batch": batch,
        "dtype": dtype,
    }


def _fill_pictures(
    folder: Path,
    teacher: FillingTeacher,
    pictures: Sequence[Pair],
    views: Views,
    shard_rows: int,
    batch: int,
    dtype: Dtype,
) -> list[Rejection]:
    rejected: list[Rejection] = []
    with progress("teacher, pictures", len(pictures), "pictures") as advance:
        for name, start, end in shards.spans(len(pictures), shard_rows):
            done = shards.finished(folder, f"pictures_{name}")
            if done is None:
                done = _picture_shard(folder, name, teacher, pictures[start:end], views, batch, dtype, advance)
            else:
                advance(end - start)
            rejected += [Rejection(**row) for row in done["rejected"]]
    return rejected


def _picture_shard(
    folder: Path,
    name: str,
    teacher: FillingTeacher,
    pictures: Sequence[Pair],
    views: Views,
    batch: int,
    dtype: Dtype,
    advance: Advance,
) -> dict[str, Any]:
    rows: list[list[Vectors]] = [[] for _ in range(views.count)]
    table: dict[str, list[Any]] = {"key": [], "image_path": [], "caption": [], "captions": [], "mark": [], "bytes": []}
    rejected: list[Rejection] = []
    for start in range(0, len(pictures), batch):
        kept, images = _decoded(pictures[start : start + batch], teacher.max_pixels, table, rejected)
        for number in range(views.count if kept else 0):
            drawn = [apply(image, views.of(pair.key, number)) for pair, image in zip(kept, images, strict=True)]
            rows[number].append(teacher.encode_decoded(drawn))
        advance(min(batch, len(pictures) - start))
    names = [f"{image_folder(number)}/img_emb_{name}.npy" for number in range(views.count)]
    for path, parts in zip(names, rows, strict=True):
        stacked = np.concatenate(parts) if parts else np.zeros((0, teacher.dim), np.float32)
        embeddings.write_rows(folder / path, stacked, dtype)
    names.append(f"metadata/metadata_{name}.parquet")
    embeddings.write_table(folder / names[-1], table)
    return shards.finish(folder, f"pictures_{name}", names, rejected)


def _decoded(
    pictures: Sequence[Pair], max_pixels: int, table: dict[str, list[Any]], rejected: list[Rejection]
) -> tuple[list[Pair], list[Image.Image]]:
    """Decode a batch; the good rows go into the table, the bad ones among the rejected."""
    kept, images = [], []
    for pair in pictures:
        picture = pair.picture
        if picture is None:
            continue
        try:
            data = picture.read()
            images.append(decode(data, max_pixels, picture.origin))
        except (PictureError, OSError) as fault:
            rejected.append(Rejection(pair.key, str(fault), picture.origin))
            continue
        kept.append(pair)
        caption = pair.captions[0] if pair.captions else ""
        values = (pair.key, picture.origin, caption, list(pair.captions), fingerprint.of_bytes(data), len(data))
        for column, value in zip(table.values(), values, strict=True):
            column.append(value)
    return kept, images


def _fill_texts(folder: Path, teacher: FillingTeacher, words: Sequence[str], shard_rows: int, dtype: Dtype) -> None:
    with progress("teacher, texts", len(words), "texts") as advance:
        for name, start, end in shards.spans(len(words), shard_rows):
            if shards.finished(folder, f"texts_{name}") is None:
                part = words[start:end]
                names = [f"text_emb/text_emb_{name}.npy", f"texts/texts_{name}.parquet"]
                embeddings.write_rows(folder / names[0], _encode_by_length(teacher, part), dtype)
                embeddings.write_table(folder / names[1], {"text": list(part)})
                shards.finish(folder, f"texts_{name}", names)
            advance(end - start)


def _encode_by_length(teacher: FillingTeacher, texts: Sequence[str]) -> Vectors:
    """Embed texts in the order of their lengths, so that short ones do not pay for long ones, and put them back."""
    order = np.argsort(np.asarray(teacher.text_lengths(texts)), kind="stable")
    encoded = teacher.encode_texts([texts[row] for row in order])
    out = np.empty_like(encoded)
    out[order] = encoded
    return out
