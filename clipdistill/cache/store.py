"""The teacher's embeddings, computed once and kept with proof of what made them.

The folder has clip-retrieval's layout, so its tools and autofaiss can read it: ``img_emb/img_emb_0.npy`` (float16 or
float32, one row a picture) beside ``metadata/metadata_0.parquet`` (the same rows). A picture may have several captions,
so the texts are a list of their own: ``text_emb/text_emb_0.npy`` beside ``texts/texts_0.parquet``, each unique text
once. Further views of the pictures lie in ``img_emb_view1/`` and so on. ``manifest.json`` is written last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from clipdistill.core import fingerprint, manifest
from clipdistill.core.errors import DataError, MismatchError
from clipdistill.data.records import Pair, Picture, Rejection
from clipdistill.data.views import View, view
from clipdistill.towers.encoder import Vectors

KIND, VERSION = "teacher-cache", 1
REMEDY = "Use another cache.folder, or build it again with --force."
_ADOPTED_REMEDY = "Add the rows to the embeddings folder, or take them out of the data."
Dtype = Literal["float16", "float32"]


@dataclass(frozen=True, slots=True)
class Views:
    """How a picture's views are drawn: view 0 is the whole picture, the others are pure functions of their number.

    Attributes:
        count: Views a picture.
        seed: The seed of the crops.
        scale: The least and largest share of the picture that a crop keeps.
    """

    count: int = 1
    seed: int = 0
    scale: tuple[float, float] = (0.6, 1.0)

    def of(self, key: str, number: int) -> View:
        """The crop and mirroring of one view of the picture with this key."""
        return view(self.seed, key, number, scale=self.scale)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return {"count": self.count, "seed": self.seed, "scale": list(self.scale)}


class ProbedTeacher(Protocol):
    """What the probe needs of a live teacher."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding."""
        ...

    def encode_images(self, pictures: Sequence[Picture], batch: int = 64) -> Vectors:
        """Embed whole pictures."""
        ...

    def encode_texts(self, texts: Sequence[str], batch: int = 256) -> Vectors:
        """Embed texts."""
        ...


class Rows:
    """float16 or float32 rows spread over several memory-mapped ``.npy`` files, read by row number."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._parts: list[npt.NDArray[np.floating]] = [
            np.load(path, mmap_mode="r", allow_pickle=False) for path in paths
        ]
        self._ends = np.cumsum([len(part) for part in self._parts]) if paths else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def dim(self) -> int:
        """The width of a row; 0 where there are no files."""
        return int(self._parts[0].shape[1]) if self._parts else 0

    @property
    def dtype(self) -> str:
        """The precision of the rows as they are stored; float32 where there are no files."""
        return str(self._parts[0].dtype) if self._parts else "float32"

    def take(self, rows: npt.NDArray[np.int64]) -> Vectors:
        """The rows with these numbers as float32 [rows, dim], made unit again after the rounding."""
        out = self.read(rows).astype(np.float32)
        out /= np.linalg.norm(out, axis=1, keepdims=True)
        return out

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The rows with these numbers as they are stored: [rows, ...]."""
        shape, dtype = (self._parts[0].shape[1:], self._parts[0].dtype) if self._parts else ((0,), np.float32)
        out = np.empty((len(rows), *shape), dtype)
        part_of = np.searchsorted(self._ends, rows, side="right")
        for part in np.unique(part_of):
            chosen = part_of == part
            first = self._ends[part] - len(self._parts[part])
            out[chosen] = self._parts[part][rows[chosen] - first]
        return out


class TeacherCache:
    """A teacher's embeddings of pictures (by key and view) and of texts (by the text itself).

    Build one with :func:`clipdistill.cache.fill`, open one with :meth:`open`, or adopt a clip-retrieval folder with
    :func:`clipdistill.cache.adopt`.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        images: Sequence[Rows],
        texts: Rows,
        image_index: Mapping[str, int],
        text_index: Mapping[str, int],
        marks: Mapping[str, tuple[str, int]],
    ) -> None:
        self.folder, self.facts = folder, dict(facts)
        self._images, self._texts = list(images), texts
        self._image_index, self._text_index, self._marks = image_index, text_index, marks
        self.dim = images[0].dim if images and len(images[0]) else texts.dim
        self.scale = float(facts["logit_scale"])
        self.bias: float | None = facts.get("logit_bias")
        recorded = facts.get("views") or {"count": 1, "seed": 0, "scale": (0.6, 1.0)}
        low, high = recorded["scale"]
        self.drawn = Views(recorded["count"], recorded["seed"], (low, high))

    @staticmethod
    def open(folder: str | Path, *, verify: bool = True) -> TeacherCache:
        """Open a finished cache.

        Args:
            folder: The cache's folder.
            verify: Compare every file with its recorded SHA-256.

        Raises:
            DataError: If it was never finished.
            MismatchError: If it is of another kind or version, or a file differs.
        """
        folder = Path(folder)
        facts = manifest.read(folder, KIND, VERSION, REMEDY)
        if verify:
            manifest.verify_files(folder, facts["files"], REMEDY)
        views = facts["views"]["count"]
        images = [Rows(sorted((folder / image_folder(n)).glob("*.npy"))) for n in range(views)]
        texts = Rows(sorted((folder / "text_emb").glob("*.npy")))
        table = [pq.read_table(path).to_pydict() for path in sorted((folder / "metadata").glob("*.parquet"))]
        keys = [key for part in table for key in part["key"]]
        marks = [pair for part in table for pair in zip(part["mark"], part["bytes"], strict=True)]
        words = [
            text
            for path in sorted((folder / "texts").glob("*.parquet"))
            for text in pq.read_table(path)["text"].to_pylist()
        ]
        _check_count(folder, "pictures", len(keys), [len(rows) for rows in images])
        _check_count(folder, "texts", len(words), [len(texts)])
        return TeacherCache(
            folder,
            facts,
            images,
            texts,
            {key: row for row, key in enumerate(keys)},
            {text: row for row, text in enumerate(words)},
            dict(zip(keys, marks, strict=True)),
        )

    @property
    def views(self) -> int:
        """How many views of each picture are stored."""
        return len(self._images)

    @property
    def widest(self) -> int:
        """The width that a student takes where none is asked for: this teacher's own."""
        return self.dim

    @property
    def dtype(self) -> str:
        """The precision of the stored rows: ``float16`` or ``float32``."""
        return (self._images[0] if self._images and len(self._images[0]) else self._texts).dtype

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the cache holds and of what made it."""
        kept = {key: self.facts.get(key) for key in ("teacher", "logit_scale", "logit_bias", "views", "files")}
        return fingerprint.of_value(kept)

    @property
    def rejected(self) -> list[Rejection]:
        """The pictures that could not be decoded when the cache was filled."""
        return [Rejection(**row) for row in self.facts.get("rejected", [])]

    def has_image(self, key: str) -> bool:
        """Whether the picture with this key has a row."""
        return key in self._image_index

    def has_text(self, text: str) -> bool:
        """Whether this text has a row."""
        return text in self._text_index

    def image_rows(self, keys: Sequence[str], views: Sequence[int] | None = None) -> Vectors:
        """The teacher's embeddings of pictures.

        Args:
            keys: The pictures' keys.
            views: The number of the view for each; none = the whole pictures.

        Returns:
            float32 [keys, dim], unit rows.

        Raises:
            DataError: If a key has no row, naming it.
        """
        rows = _numbers(self._image_index, keys, "picture", self.folder)
        if views is None:
            return self._images[0].take(rows)
        out = np.empty((len(keys), self.dim), np.float32)
        numbers = np.asarray(views)
        for number in np.unique(numbers):
            chosen = numbers == number
            out[chosen] = self._images[number].take(rows[chosen])
        return out

    def text_rows(self, texts: Sequence[str]) -> Vectors:
        """The teacher's embeddings of texts: float32 [texts, dim], unit rows.

        Raises:
            DataError: If a text has no row, naming it.
        """
        return self._texts.take(_numbers(self._text_index, texts, "text", self.folder))

    def view(self, key: str, number: int) -> View:
        """The crop and mirroring that a stored view of a picture was made with."""
        return self.drawn.of(key, number)

    def mark(self, key: str) -> str | None:
        """The content mark of the picture's bytes when its row was made; None where it is not known."""
        found = self._marks.get(key)
        return found[0] if found else None

    def check_teacher(self, teacher: ProbedTeacher) -> None:
        """Refuse a cache that another teacher made.

        Raises:
            MismatchError: Naming the part that differs (weights, preprocessing, tokenizer) and both values.
        """
        recorded = self.facts["teacher"]
        parts: Mapping[str, str] = getattr(teacher, "parts", {})
        for part, value in parts.items():
            if recorded["parts"].get(part) != value:
                raise MismatchError(str(self.folder), f"teacher.{part}", value, recorded["parts"].get(part), REMEDY)
        if recorded["fingerprint"] != teacher.fingerprint:
            raise MismatchError(
                str(self.folder), "teacher.fingerprint", teacher.fingerprint, recorded["fingerprint"], REMEDY
            )

    def check_views(self, views: Views) -> None:
        """Refuse a cache whose views were drawn otherwise.

        Raises:
            MismatchError: Naming the parameter and both values.
        """
        wanted, found = views.to_json(), self.drawn.to_json()
        for name, value in wanted.items():
            if found[name] != value and not (wanted["count"] == found["count"] == 1):
                raise MismatchError(str(self.folder), f"views.{name}", value, found[name], REMEDY)

    def check_dtype(self, dtype: Dtype) -> None:
        """Refuse a cache whose rows are stored in another precision.

        Raises:
            MismatchError: Naming both precisions.
        """
        if self.dtype != dtype:
            remedy = f'Set cache.dtype = "{self.dtype}", or: {REMEDY}'
            raise MismatchError(str(self.folder), "cache.dtype", dtype, self.dtype, remedy)

    def check_data(self, pairs: Sequence[Pair], texts: Sequence[str]) -> None:
        """Refuse a cache that lacks rows of the data, or whose pictures have changed since.

        Pictures held in memory are compared by content, those in files by size; the training loop compares the
        content of those as it reads them.

        Raises:
            MismatchError: Naming the first row that differs and how many do.
        """
        refused = {row.key for row in self.rejected}
        with_picture = [pair for pair in pairs if pair.picture is not None and pair.key not in refused]
        missing = [pair.key for pair in with_picture if not self.has_image(pair.key)]
        self._refuse_missing("pictures", missing, len(with_picture))
        wanted = dict.fromkeys([*(text for pair in pairs for text in pair.captions), *texts])
        self._refuse_missing("texts", [text for text in wanted if not self.has_text(text)], len(wanted))
        for pair in with_picture:
            self._check_picture(pair)

    def _refuse_missing(self, what: str, missing: Sequence[str], total: int) -> None:
        if missing:
            found = f"{total - len(missing)} (the first that is missing: {missing[0]!r})"
            remedy = _ADOPTED_REMEDY if self.facts.get("adopted") else REMEDY
            raise MismatchError(str(self.folder), f"data.{what}", f"rows for all {total}", found, remedy)

    def _check_picture(self, pair: Pair) -> None:
        recorded, picture = self._marks.get(pair.key), pair.picture
        if recorded is None or picture is None:
            return
        mark, size = recorded
        if picture.data is not None:
            found = fingerprint.of_bytes(picture.data)
            if found != mark:
                raise MismatchError(f"{self.folder}: picture {pair.key}", "content", mark, found, REMEDY)
        elif picture.size is not None or picture.path is not None:
            now = picture.size if picture.size is not None else _size(picture.path)
            if now != size:
                raise MismatchError(f"{self.folder}: picture {pair.key}", "bytes", size, now, REMEDY)

    def probe(self, teacher: ProbedTeacher, pairs: Sequence[Pair], *, rows: int, cosine: float) -> float:
        """Encode a few rows again and compare them with the stored ones.

        Args:
            teacher: The live teacher.
            pairs: Where the pictures and texts are taken from, evenly spaced.
            rows: How many pictures, and how many texts.
            cosine: The least cosine that is accepted.

        Returns:
            The least cosine found; 1.0 where nothing was probed.

        Raises:
            MismatchError: If a row's cosine is below the bound, naming the row.
        """
        usable = [pair for pair in pairs if pair.picture is not None and self.has_image(pair.key)]
        chosen = usable[:: max(1, len(usable) // rows)][:rows] if rows else []
        if not chosen:
            return 1.0
        pictures = [pair.picture for pair in chosen if pair.picture is not None]
        texts = list(dict.fromkeys(text for pair in chosen for text in pair.captions[:1] if self.has_text(text)))
        names = [*(pair.key for pair in chosen), *texts]
        stored = [self.image_rows([pair.key for pair in chosen])]
        live = [teacher.encode_images(pictures)]
        if texts:
            stored.append(self.text_rows(texts))
            live.append(teacher.encode_texts(texts))
        cosines = (np.concatenate(stored) * np.concatenate(live)).sum(axis=1)
        worst = int(cosines.argmin())
        if cosines[worst] < cosine:
            where = f"{self.folder}: row {names[worst]!r}"
            raise MismatchError(where, "cosine with the live teacher", f"at least {cosine}", cosines[worst], REMEDY)
        return float(cosines[worst])


def image_folder(number: int) -> str:
    """The folder of a view's embeddings: ``img_emb`` for the whole pictures, as clip-retrieval names it."""
    return "img_emb" if number == 0 else f"img_emb_view{number}"


def _numbers(index: Mapping[str, int], names: Sequence[str], what: str, folder: Path) -> npt.NDArray[np.int64]:
    try:
        return np.fromiter((index[name] for name in names), np.int64, len(names))
    except KeyError as missing:
        raise DataError(f"{folder}: the teacher's cache has no row for the {what} {missing}. {REMEDY}") from None


def _check_count(folder: Path, what: str, expected: int, counts: Sequence[int]) -> None:
    for count in counts:
        if count != expected:
            raise MismatchError(str(folder), f"number of {what}", expected, count, REMEDY)


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else -1
