"""The records that flow through the package: one picture with its captions, and what was refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Picture:
    """Where a picture's encoded bytes are: held in memory, or a span of a file (a whole file, or a tar's member).

    Attributes:
        origin: The name used in messages: a path, or ``table.parquet[12]``, or ``shard.tar/0001.jpg``.
        data: The bytes themselves, or None where they lie in ``path``.
        path: The file that holds the bytes, or None where ``data`` does.
        offset: Where in the file the bytes begin.
        size: How many bytes; None means to the end of the file.
    """

    origin: str
    data: bytes | None = None
    path: Path | None = None
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Read the encoded bytes.

        Raises:
            OSError: If the file cannot be read.
        """
        if self.data is not None:
            return self.data
        if self.path is None:
            return b""
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            return handle.read(-1 if self.size is None else self.size)


@dataclass(frozen=True, slots=True)
class Pair:
    """One row of the user's data: a picture with its captions; an unpaired picture or text is a pair with a hole.

    Attributes:
        key: Unique over all the run's data, and stable: results, indexes and caches name rows by it.
        picture: The picture, or None for an unpaired text.
        captions: The texts, none for an unpaired picture.
        label: The class that the picture belongs to, as the data name it; None where no class is known.
    """

    key: str
    picture: Picture | None
    captions: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Rejection:
    """A row that was refused, with the reason.

    Attributes:
        key: The row's key, or the best name for it where it has none.
        reason: Why, in a phrase: ``truncated picture``, ``no caption``, ``duplicate key``.
        origin: The file that it came from.
    """

    key: str
    reason: str
    origin: str
