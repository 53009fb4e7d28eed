"""Thumbnails of indexed pictures: looked up in one folder that nothing leads out of, and always encoded anew."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, final

from PIL import Image

from clipdistill.core.errors import ConfigError
from clipdistill.data.pictures import PictureError, decode, measured
from clipdistill.data.records import Picture

_QUALITY = 82
_FILE_BYTES = 256 << 20
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class PictureSource(Protocol):
    """What knows the pictures of an index."""

    def find(self, key: str) -> Picture | None:
        """The picture of a key; None where there is none."""
        ...


@final
class PictureFolder:
    """The pictures below a folder, by the keys that the package's readers make of their paths.

    A key is tried as a path below the folder, then without its first part where that is the folder's own name (as the
    readers of folders write keys), each also with the usual suffixes. What lies outside once symbolic links are
    followed is not there.

    Args:
        folder: The folder.

    Raises:
        ConfigError: If it is not a folder.
    """

    def __init__(self, folder: str | Path) -> None:
        if not Path(folder).is_dir():
            raise ConfigError(f"pictures: {folder}: not a folder. Give the folder that the indexed pictures lie in")
        self._folder = Path(folder).resolve(strict=True)

    def find(self, key: str) -> Picture | None:
        """The picture of a key; None where no plain file inside the folder fits."""
        for name in self._names(key):
            try:
                path = (self._folder / name).resolve(strict=True)
            except (OSError, ValueError, RuntimeError):  # absent or too long a name; a NUL character; a circle of links
                continue
            if path.is_relative_to(self._folder) and path.is_file():
                return Picture(key, path=path)
        return None

    def _names(self, key: str) -> Iterator[str]:
        first, _, rest = key.partition("/")
        for name in (key, rest) if first == self._folder.name and rest else (key,):
            yield name
            for suffix in _SUFFIXES:
                yield name + suffix
                yield name + suffix.upper()


@final
class PictureTable:
    """Pictures by key, as a run's data hold them.

    Args:
        pictures: The pictures.
    """

    def __init__(self, pictures: Mapping[str, Picture]) -> None:
        self._pictures = dict(pictures)

    def find(self, key: str) -> Picture | None:
        """The picture of a key; None where there is none."""
        return self._pictures.get(key)


@final
class Thumbnails:
    """JPEG thumbnails, the last used of them kept in memory. May be used from several threads.

    Args:
        source: Where the pictures are.
        side: The longer side, in pixels; smaller pictures keep their size.
        pixels: The largest width times height that is decoded.
        cache_bytes: How much the kept thumbnails may take together.
    """

    def __init__(self, source: PictureSource, *, side: int, pixels: int, cache_bytes: int) -> None:
        self._source, self._side, self._pixels, self._most = source, side, pixels, cache_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def jpeg(self, key: str) -> bytes | None:
        """A key's thumbnail; None where the source has no such picture.

        Raises:
            PictureError: If there is one that cannot be decoded.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        picture = self._source.find(key)
        if picture is None:
            return None
        data = self._made(picture)
        with self._lock:
            self._keep(key, data)
        return data

    def _made(self, picture: Picture) -> bytes:
        picture = measured(picture)
        if (picture.size or 0) > _FILE_BYTES:
            raise PictureError(f"too large a file: {picture.size} bytes", picture.origin)
        try:
            data = picture.read()
        except OSError as error:
            raise PictureError(f"unreadable file: {error.strerror}", picture.origin) from error
        image = decode(data, self._pixels, picture.origin)
        image.thumbnail((self._side, self._side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=_QUALITY, optimize=True)
        return out.getvalue()

    def _keep(self, key: str, data: bytes) -> None:
        self._size += len(data) - len(self._kept.pop(key, b""))
        self._kept[key] = data
        while self._size > self._most:
            self._size -= len(self._kept.popitem(last=False)[1])
