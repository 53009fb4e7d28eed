"""Pictures: what their header says, and their pixels, out of files that nobody vouches for.

Only the formats of :data:`FORMATS` are opened, each by its first bytes and never by its name. The pixel count is read
from the header before anything is decoded, and a truncated picture is an error, never half a picture.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from clipdistill.core.errors import DataError
from clipdistill.data.records import Picture

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from PIL.ImageFile import ImageFile

_MAGIC: tuple[tuple[str, bytes], ...] = (
    ("JPEG", b"\xff\xd8\xff"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("WEBP", b"RIFF"),
    ("GIF", b"GIF87a"),
    ("GIF", b"GIF89a"),
    ("BMP", b"BM"),
    ("TIFF", b"II*\0"),
    ("TIFF", b"MM\0*"),
)
_OPENERS: dict[str, Callable[[IO[bytes]], ImageFile]] = {
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
FORMATS: tuple[str, ...] = tuple(_OPENERS)
"""The formats that are opened; everything else is refused as not a picture."""

_HEAD = 32
_WEBP_HEADER = 30
_UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(DataError):
    """One picture cannot be used.

    Args:
        reason: Why, in a phrase whose part before the first colon is the same for all pictures of that fault.
        origin: The picture, named as in :class:`Picture`.
    """

    def __init__(self, reason: str, origin: str) -> None:
        self.reason, self.origin = reason, origin
        super().__init__(f"{origin}: {reason}")

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, str]]:
        """Rebuild from both parts, so that the error crosses from a worker process."""
        return PictureError, (self.reason, self.origin)


def measured(picture: Picture) -> Picture:
    """The same picture with its number of bytes filled in, at the cost of at most one ``stat``.

    Raises:
        PictureError: If its file is missing, or is not a plain file.
    """
    if picture.data is not None or picture.path is None or picture.size is not None:
        return picture
    try:
        status = picture.path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL byte in the name
        raise PictureError("missing file", picture.origin) from None
    except OSError as error:
        raise PictureError(f"unreadable file: {error.strerror}", picture.origin) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could wait, or never end
        raise PictureError("not a plain file", picture.origin)
    return replace(picture, size=max(0, status.st_size - picture.offset))


def check_header(picture: Picture, max_pixels: int) -> tuple[int, int]:
    """Read a picture's width and height from its header, and refuse what is plainly no usable picture.

    Only as many bytes are read as the header takes. A picture that is cut later than that, or whose pixels are
    corrupt, passes here and is refused by :func:`decode`.

    Args:
        picture: Where the bytes are.
        max_pixels: The largest width times height that is accepted.

    Returns:
        Width and height in pixels as stored, before any EXIF rotation.

    Raises:
        PictureError: With a short reason: missing, empty, no known format, a broken header, or too many pixels.
    """
    picture = measured(picture)
    with _opened(picture) as (handle, extent):
        return _header(handle, extent, max_pixels, picture.origin)


def decode(data: bytes, max_pixels: int, origin: str) -> Image.Image:
    """Decode a picture into upright 8-bit RGB.

    EXIF orientation is applied; transparency is composited on white; 16-bit grey is scaled to 8 bits; of an animation
    the first frame is taken. ICC profiles are not applied, as in open_clip.

    Args:
        data: The encoded bytes, whole.
        max_pixels: The largest width times height that is decoded; more is refused from the header alone.
        origin: The picture's name, for the message.

    Raises:
        PictureError: Naming the origin, for whatever is wrong with the bytes.
    """
    handle = io.BytesIO(data)
    _header(handle, len(data), max_pixels, origin)
    handle.seek(0)
    try:
        with _OPENERS[_format(data[:_HEAD]) or ""](handle) as image:
            image.load()
            return _upright(_rgb(image), _orientation(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt bytes; one bad picture is one row
        raise PictureError(_reason(error, "corrupt picture"), origin) from error


def _format(head: bytes) -> str | None:
    name = next((name for name, magic in _MAGIC if head.startswith(magic)), None)
    return None if name == "WEBP" and head[8:12] != b"WEBP" else name


def _header(handle: IO[bytes], extent: int, max_pixels: int, origin: str) -> tuple[int, int]:
    if extent == 0:
        raise PictureError("empty file", origin)
    head = handle.read(_HEAD)
    name = _format(head)
    if name is None:
        raise PictureError("not a picture (wrongly named?): none of " + ", ".join(FORMATS), origin)
    try:
        if name == "WEBP":  # Pillow would read it whole, and allocate the canvas that the header asks for
            width, height = _webp_size(head, extent)
        else:
            handle.seek(0)
            width, height = _OPENERS[name](handle).size
    except Exception as error:  # as in decode: anything can come out of a broken header
        raise PictureError(_reason(error, "broken picture header"), origin) from error
    if width * height > max_pixels:
        raise PictureError(f"too many pixels: {width}x{height} is over data.max_pixels {max_pixels}", origin)
    return width, height


def _webp_size(head: bytes, extent: int) -> tuple[int, int]:
    """Width and height by the WebP container specification (RFC 9649), from the file's first 30 bytes."""
    declared = int.from_bytes(head[4:8], "little") + 8
    if extent < _WEBP_HEADER or extent + 1 < declared:  # some writers leave out the last padding byte
        raise EOFError(f"truncated: {extent} of {declared} bytes")
    chunk, little = head[12:16], int.from_bytes
    if chunk == b"VP8X":
        return little(head[24:27], "little") + 1, little(head[27:30], "little") + 1
    if chunk == b"VP8L" and head[20] == 0x2F:
        bits = little(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = little(head[26:28], "little") & 0x3FFF, little(head[28:30], "little") & 0x3FFF
        if width and height:
            return width, height
    raise ValueError("unknown WebP chunk")


def _reason(error: Exception, kind: str) -> str:
    text = str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels: {text}"
    if isinstance(error, EOFError) or "truncated" in text.lower() or "unexpected end" in text.lower():
        return "truncated picture"
    return f"{kind}: {text or type(error).__name__}"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits: integers are taken as 16-bit; floats as 0 to 1, or 0 to 255 where any is above 1."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    floats = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    full = floats if image.mode == "F" else 65535.0
    return Image.fromarray(np.rint(np.clip(values / full, 0.0, 1.0) * 255.0).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none or the EXIF block is broken: the pixels are whole all the same."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block raises as freely as broken pixels
        return 1
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


@contextmanager
def _opened(picture: Picture) -> Iterator[tuple[IO[bytes], int]]:
    """The picture's bytes as a seekable stream that reads no more than it is asked for, and their number."""
    if picture.data is not None or picture.path is None:
        data = picture.data or b""
        yield io.BytesIO(data), len(data)
        return
    try:
        raw = picture.path.open("rb", buffering=0)
    except FileNotFoundError:
        raise PictureError("missing file", picture.origin) from None
    except OSError as error:
        raise PictureError(f"unreadable file: {error.strerror}", picture.origin) from error
    size = picture.size or 0
    with raw, io.BufferedReader(_Span(raw, picture.offset, size)) as handle:
        yield handle, size


class _Span(io.RawIOBase):
    """A window into an open file: a tar's member as a file of its own."""

    def __init__(self, file: io.FileIO, offset: int, size: int) -> None:
        super().__init__()
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        wanted = max(0, min(len(view), self._size - self._at))
        self._file.seek(self._offset + self._at)
        got = self._file.readinto(view[:wanted]) or 0
        self._at += got
        return got
