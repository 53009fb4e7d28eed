"""The teacher's inner blocks, stored beside its embeddings: pooled to cells, float16, read by memory map.

A folder of its own below the cache's, ``blocks/NAME``: ``image_0/view0_0.npy`` [pictures, cells, width] beside
``keys/keys_0.parquet``, and ``text_0/rows_0.npy`` [texts, cells, width] beside ``texts/texts_0.parquet``. The name is
that of what the rows are of, so that one cache may serve runs that look at other blocks. ``manifest.json`` comes last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, final

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from PIL import Image

from clipdistill.cache import shards
from clipdistill.cache.store import Rows, Views
from clipdistill.core import fingerprint, manifest
from clipdistill.core.errors import DataError
from clipdistill.core.progress import Advance, progress
from clipdistill.data import embeddings
from clipdistill.data.pictures import PictureError, decode
from clipdistill.data.records import Pair
from clipdistill.data.views import apply
from clipdistill.towers.encoder import Vectors
from clipdistill.towers.pooling import at_unit_scale
from clipdistill.towers.student import Side
from clipdistill.towers.tap import Pass, Tap

_KIND, _VERSION = "teacher-blocks", 1
_REMEDY = "Remove the folder: it is made again from the teacher."
_DTYPE = "float16"
Cells = npt.NDArray[np.float16]
_log = logging.getLogger("clipdistill")


class BlockTeacher(Protocol):
    """What filling needs of a teacher; its blocks are seen by the taps."""

    max_pixels: int

    def encode_decoded(self, images: Sequence[Image.Image]) -> Vectors:
        """Embed decoded pictures as one batch."""
        ...

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts."""
        ...

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens a text, to group texts of equal cost."""
        ...


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What is stored of which rows.

    Attributes:
        cache: The fingerprint of the embeddings that the blocks belong to: teacher, pictures' content and views.
        image: The picture tower's blocks.
        text: The text tower's blocks.
        cells: Parts of a picture along each axis, and spans of a text.
        pictures: The pictures' keys, each once.
        texts: The texts, each once.
    """

    cache: str
    image: tuple[str, ...]
    text: tuple[str, ...]
    cells: int
    pictures: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name: what is stored, then of which rows."""
        return f"{self.kind}-{fingerprint.of_lines([*self.pictures, '', *self.texts])[:12]}"

    @property
    def kind(self) -> str:
        """What is stored, whatever the rows."""
        return fingerprint.of_value([self.cache, self.image, self.text, self.cells])[:12]

    def bytes(self, widths: Mapping[Side, Mapping[str, int]], views: int) -> int:
        """How many bytes the rows take.

        Args:
            widths: Of each block, by side.
            views: Views a picture.
        """
        image = sum(widths["image"][name] for name in self.image) * self.cells**2 * len(self.pictures) * views
        text = sum(widths["text"][name] for name in self.text) * self.cells * len(self.texts)
        return np.dtype(_DTYPE).itemsize * (image + text)


def fact_name(side: Side, block: str) -> str:
    """What a batch calls the stored cells of a block."""
    return f"block {side} {block}"


@final
class StoredBlocks:
    """The stored cells of a teacher's blocks, as facts of a batch's rows; open with :func:`open_blocks`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        facts = manifest.read(folder, _KIND, _VERSION, _REMEDY)
        manifest.verify_files(folder, facts["files"], _REMEDY)
        self._images = {
            name: [_rows(folder / f"image_{number}", f"view{view}") for view in range(facts["views"])]
            for number, name in enumerate(facts["image"])
        }
        self._texts = {name: _rows(folder / f"text_{number}", "rows") for number, name in enumerate(facts["text"])}
        self._keys, self._words = _index(folder, "keys", "key"), _index(folder, "texts", "text")

    def covers(self, plan: BlockPlan) -> bool:
        """Whether all rows of a plan are here."""
        return all(key in self._keys for key in plan.pictures) and all(text in self._words for text in plan.texts)

    def of_images(self, keys: Sequence[str], views: Sequence[int]) -> Mapping[str, Cells]:
        """By fact name float16 [keys, cells, width] at root mean square 1, of these views of these pictures."""
        if not self._images:
            return {}
        rows, numbers = self._numbers(self._keys, keys, "picture"), np.asarray(views)
        return {fact_name("image", name): _of_views(parts, rows, numbers) for name, parts in self._images.items()}

    def of_texts(self, texts: Sequence[str]) -> Mapping[str, Cells]:
        """By fact name float16 [texts, cells, width] at root mean square 1."""
        if not self._texts:
            return {}
        rows = self._numbers(self._words, texts, "text")
        return {fact_name("text", name): part.read(rows) for name, part in self._texts.items()}

    def _numbers(self, index: Mapping[str, int], names: Sequence[str], what: str) -> npt.NDArray[np.int64]:
        missing = next((name for name in names if name not in index), None)
        if missing is not None:
            raise DataError(f"{self.folder}: no blocks are stored of the {what} {missing!r}. {_REMEDY}")
        return np.fromiter((index[name] for name in names), np.int64, len(names))


def open_blocks(cache: Path, plan: BlockPlan) -> StoredBlocks | None:
    """Stored blocks that hold all rows of a plan, and perhaps more; None where there are none yet.

    Args:
        cache: The teacher cache's folder.
        plan: What is wanted.

    Raises:
        MismatchError: If a file differs from its manifest.
    """
    whole = [path.parent for path in (cache / "blocks").glob(f"{plan.kind}-*/{manifest.NAME}")]
    for folder in sorted(whole, key=lambda path: path.name != plan.name):
        stored = StoredBlocks(folder)
        if stored.covers(plan):
            return stored
    return None


def fill_blocks(
    cache: Path,
    plan: BlockPlan,
    teacher: BlockTeacher,
    taps: Mapping[Side, Tap],
    pairs: Sequence[Pair],
    *,
    views: Views,
    shard_rows: int = 4096,
    batch: int = 64,
) -> StoredBlocks:
    """Run the teacher once more over the rows of a plan and store its blocks; go on where a killed run stopped.

    Args:
        cache: The teacher cache's folder.
        plan: What to store.
        teacher: The live teacher.
        taps: On its towers, with the plan's blocks and cells.
        pairs: The pictures of the plan, in its order.
        views: How the views are drawn.
        shard_rows: Pictures or texts a shard.
        batch: Pictures a forward pass.

    Raises:
        DataError: If a picture cannot be read any more.
        MismatchError: If the folder holds a part of something else.
    """
    folder, started = cache / "blocks" / plan.name, time.monotonic()
    noted = {"plan": fingerprint.of_value(asdict(plan)), "shard_rows": shard_rows, "batch": batch, "dtype": _DTYPE}
    shards.begin(folder, noted)
    writer = _Writer(folder, plan, teacher, views, batch)
    if plan.image:
        with taps["image"].watching() as tap:
            writer.write_pictures(tap, pairs, shard_rows)
    if plan.text:
        with taps["text"].watching() as tap:
            writer.write_texts(tap, shard_rows)
    facts = {
        "cache": plan.cache,
        "image": list(plan.image),
        "text": list(plan.text),
        "cells": plan.cells,
        "views": views.count,
        "pictures": len(plan.pictures),
        "texts": len(plan.texts),
    }
    manifest.write(folder, _KIND, _VERSION, facts, shards.digests(folder))
    shards.tidy(folder)
    _log.info(
        "teacher's blocks: of %d pictures, %d texts in %.0f s",
        len(plan.pictures),
        len(plan.texts),
        time.monotonic() - started,
    )
    return StoredBlocks(folder)


@dataclass(frozen=True, slots=True)
class _Writer:
    folder: Path
    plan: BlockPlan
    teacher: BlockTeacher
    views: Views
    batch: int

    def write_pictures(self, tap: Tap, pairs: Sequence[Pair], shard_rows: int) -> None:
        with progress("teacher's blocks, pictures", len(pairs), "pictures") as advance:
            for name, start, end in shards.spans(len(pairs), shard_rows):
                if shards.finished(self.folder, f"pictures_{name}") is None:
                    self._picture_shard(tap, name, pairs[start:end], advance)
                else:
                    advance(end - start)

    def _picture_shard(self, tap: Tap, name: str, pairs: Sequence[Pair], advance: Advance) -> None:
        rows: dict[str, list[Cells]] = {}
        for start in range(0, len(pairs), self.batch):
            part = pairs[start : start + self.batch]
            images = [self._decoded(pair) for pair in part]
            for view in range(self.views.count):
                drawn = [apply(image, self.views.of(pair.key, view)) for pair, image in zip(part, images, strict=True)]
                self.teacher.encode_decoded(drawn)
                for number, cells in enumerate(_stored(tap.take(), self.plan.image)):
                    rows.setdefault(f"image_{number}/view{view}_{name}.npy", []).append(cells)
            advance(len(part))
        self._write(f"pictures_{name}", rows, f"keys/keys_{name}.parquet", {"key": [pair.key for pair in pairs]})

    def write_texts(self, tap: Tap, shard_rows: int) -> None:
        texts = self.plan.texts
        with progress("teacher's blocks, texts", len(texts), "texts") as advance:
            for name, start, end in shards.spans(len(texts), shard_rows):
                if shards.finished(self.folder, f"texts_{name}") is None:
                    rows = {
                        f"text_{number}/rows_{name}.npy": [cells]
                        for number, cells in enumerate(self._text_cells(tap, texts[start:end]))
                    }
                    self._write(f"texts_{name}", rows, f"texts/texts_{name}.parquet", {"text": list(texts[start:end])})
                advance(end - start)

    def _text_cells(self, tap: Tap, texts: Sequence[str]) -> Iterator[Cells]:
        """Texts are run in the order of their lengths, so that short ones do not pay for long ones, and put back."""
        order = np.argsort(np.asarray(self.teacher.text_lengths(texts)), kind="stable")
        self.teacher.encode_texts([texts[row] for row in order])
        for cells in _stored(tap.take(), self.plan.text):
            put_back = np.empty_like(cells)
            put_back[order] = cells
            yield put_back

    def _write(self, shard: str, rows: Mapping[str, list[Cells]], table: str, columns: dict[str, list[str]]) -> None:
        for path, parts in rows.items():
            embeddings.write_rows(self.folder / path, np.concatenate(parts), _DTYPE)
        embeddings.write_table(self.folder / table, columns)
        shards.finish(self.folder, shard, [*rows, table])

    def _decoded(self, pair: Pair) -> Image.Image:
        picture = pair.picture
        if picture is None:
            raise DataError(f"{pair.key}: a row without a picture has no blocks of one")
        try:
            return decode(picture.read(), self.teacher.max_pixels, picture.origin)
        except (PictureError, OSError) as fault:
            raise DataError(f"{picture.origin}: cannot be read, though it could when embedded: {fault}") from fault


def _stored(passes: Sequence[Pass], names: Sequence[str]) -> Iterator[Cells]:
    """The cells of each block over all passes, as they are stored."""
    for name in names:
        yield at_unit_scale(torch.cat([one.cells[name] for one in passes])).cpu().numpy().astype(np.float16)


def _of_views(parts: Sequence[Rows], rows: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> Cells:
    out: Cells | None = None
    for view in np.unique(views):
        chosen = views == view
        found = parts[view].read(rows[chosen])
        out = np.empty((len(rows), *found.shape[1:]), np.float16) if out is None else out
        out[chosen] = found
    return np.empty((0, 0, 0), np.float16) if out is None else out


def _rows(folder: Path, kind: str) -> Rows:
    return Rows(sorted(folder.glob(f"{kind}_*.npy")))


def _index(folder: Path, part: str, column: str) -> dict[str, int]:
    tables = [pq.read_table(path)[column].to_pylist() for path in sorted((folder / part).glob("*.parquet"))]
    return {name: row for row, name in enumerate(name for table in tables for name in table)}
