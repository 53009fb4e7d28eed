"""What is published: unit vectors with keys, and the encoder that made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt

from clipdistill.core.errors import DataError
from clipdistill.retrieval.exact import Vectors, check_unit
from clipdistill.retrieval.index import VectorIndex

_FLOATS = (np.float16, np.float32)


@final
class Rows:
    """Vectors with keys, ready for a database.

    Args:
        keys: The rows' names, each once, as any database can hold them: not empty, no NUL, valid Unicode.
        vectors: Unit rows [len(keys), dim], float16 or float32; may be memory-mapped.
        encoder: The fingerprint of the encoder that made them.

    Raises:
        DataError: If a key is unusable or repeated, the counts differ, a row is not of unit length, or there is no
            fingerprint.
    """

    __slots__ = ("_vectors", "encoder", "keys")

    def __init__(self, keys: Sequence[str], vectors: Vectors, encoder: str) -> None:
        if not encoder or not encoder.isprintable():
            raise DataError(
                f"encoder: {encoder!r} names no encoder: give the fingerprint of the one that made the rows"
            )
        if vectors.ndim != 2 or not vectors.shape[1] or vectors.dtype not in _FLOATS:
            raise DataError(
                f"vectors: {vectors.dtype} of shape {vectors.shape}: float16 or float32 [rows, dimensions] is needed"
            )
        if len(keys) != len(vectors):
            raise DataError(f"publish: {len(vectors)} vectors and {len(keys)} ids; each vector needs one")
        check_keys(keys)
        check_unit(vectors, "vectors to publish")
        self.keys = tuple(keys)
        self.encoder = encoder
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def dim(self) -> int:
        """The width of the vectors."""
        return int(self._vectors.shape[1])

    def part(self, start: int, stop: int) -> tuple[tuple[str, ...], npt.NDArray[np.float32]]:
        """The keys and the vectors, float32 [rows, dim], of some rows that follow each other."""
        return self.keys[start:stop], np.ascontiguousarray(self._vectors[start:stop], np.float32)

    @classmethod
    def of_index(cls, folder: Path) -> Rows:
        """The rows of a saved index.

        Args:
            folder: What :meth:`~clipdistill.retrieval.index.VectorIndex.save` wrote.

        Raises:
            DataError: If it cannot be read, or keeps its vectors compressed.
            MismatchError: If a file differs from the manifest.
        """
        index = VectorIndex.load(folder, encoder=None)
        return cls(index.ids, index.vectors(), index.encoder)

    @classmethod
    def of_files(cls, vectors: Path, ids: Path, encoder: str) -> Rows:
        """The rows of a ``.npy`` file.

        Args:
            vectors: float16 or float32 [rows, dim]; no pickles.
            ids: One name a line: JSON strings where the file ends in ``.jsonl``, else plain text.
            encoder: The fingerprint of the encoder that made the vectors.

        Raises:
            DataError: If a file cannot be read, or the two do not fit.
        """
        try:
            array = np.load(vectors, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as fault:
            raise DataError(f"{vectors}: not a NumPy file of numbers: {fault}") from fault
        if not isinstance(array, np.ndarray):
            raise DataError(f"{vectors}: an archive of several arrays: give a .npy file with one matrix")
        return cls(_read_ids(ids), array, encoder)


def check_keys(keys: Sequence[str]) -> None:
    """Refuse keys that a database cannot hold or tell apart.

    Raises:
        DataError: Naming the first key that is empty, repeated, holds a NUL or is not valid Unicode.
    """
    seen: set[str] = set()
    for row, key in enumerate(keys):
        if not isinstance(key, str) or not key or "\0" in key or not _is_unicode(key):
            raise DataError(
                f"row {row}: the key {key!r} cannot be published: keys are texts that are not empty, hold no NUL and "
                "are valid Unicode"
            )
        if key in seen:
            raise DataError(f"row {row}: the key {key!r} occurs twice; each row needs its own")
        seen.add(key)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_ids(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines and not lines[-1]:
            lines.pop()
        return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except ValueError as fault:
        raise DataError(f"{path}: not a list of keys, one a line, in UTF-8: {fault}") from fault
