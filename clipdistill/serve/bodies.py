"""Reading what clients send: bodies under a cap while they stream in, JSON, and pictures in base64."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, final

from fastapi import Request

from clipdistill.serve.options import Options
from clipdistill.serve.problems import BusyError, ProblemError

_DRAINED = 8  # times the cap: so much of a body that is too large is read and dropped, so that its sender sees why
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)


@final
class Bodies:
    """Reads bodies, and bounds what all of them hold together.

    Args:
        options: The bounds.
    """

    def __init__(self, options: Options) -> None:
        self._most, self._together = options.body_bytes, options.buffered_bytes
        self._seconds = options.body_seconds
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, whole; its bytes count as held until the context is left.

        Raises:
            ProblemError: 413 where it is over the cap, 408 where it does not arrive in time.
            BusyError: If other bodies take all the room.
        """
        chunks: list[bytes] = []
        try:
            await self._receive(request, chunks)
            yield b"".join(chunks)
        finally:
            self._held -= sum(map(len, chunks))

    async def _receive(self, request: Request, chunks: list[bytes]) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                size = await self._stream(request, chunks)
        except TimeoutError:
            raise ProblemError(408, f"the body did not arrive within {self._seconds:g} s") from None
        if size > self._most:
            raise ProblemError(413, f"the body is larger than the {self._most} bytes that are accepted")

    async def _stream(self, request: Request, chunks: list[bytes]) -> int:
        """Keep the chunks of a body that is small enough; of a larger one read on and keep none."""
        size = _declared(request)
        if size > self._most * _DRAINED:
            return size
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self._most * _DRAINED:
                break
            if size <= self._most:
                self._keep(chunk, chunks)
        return size

    def _keep(self, chunk: bytes, chunks: list[bytes]) -> None:
        if self._held + len(chunk) > self._together:
            raise BusyError(1)
        self._held += len(chunk)
        chunks.append(chunk)


def _declared(request: Request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 19 else 0


def media_type(request: Request) -> str:
    """The body's media type in lower case, without parameters; empty where the request names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_json(data: bytes) -> dict[str, Any]:
    """Parse a body that must be one JSON object.

    Raises:
        ProblemError: 400 where it is not.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ProblemError(400, "the body is nested too deeply") from None
    except ValueError as fault:  # no JSON, no UTF-8, or a number of thousands of digits
        where = f" (line {fault.lineno}, column {fault.colno})" if isinstance(fault, json.JSONDecodeError) else ""
        raise ProblemError(400, f"the body is not valid JSON{where}") from None
    if not isinstance(value, dict):
        raise ProblemError(400, "the body must be a JSON object")
    return value


def is_data_url(text: str) -> bool:
    """Whether a text is a picture written as a data URL."""
    return text[:5].lower() == "data:" and _DATA_URL.match(text[:80]) is not None


def picture_bytes(text: str, where: str) -> bytes:
    """Decode a picture given as base64, plain or as a data URL. Addresses are refused: nothing is ever fetched.

    Args:
        text: The base64.
        where: The field, for the message.

    Raises:
        ProblemError: 422 where it is neither.
    """
    if re.match(r"[a-z][a-z0-9+.-]{1,20}://", text[:32], re.IGNORECASE):
        raise ProblemError(422, f"{where}: addresses are not fetched; send the picture's bytes in base64")
    match = _DATA_URL.match(text[:80])
    if match is None and text[:5].lower() == "data:":
        raise ProblemError(422, f"{where}: of data URLs only data:image/...;base64, is read")
    try:
        data = base64.b64decode(text[match.end() :] if match else text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
        raise ProblemError(422, f"{where}: not valid base64") from None
    if not data:
        raise ProblemError(422, f"{where}: the picture is empty")
    return data


def checked_text(text: str, where: str, most: int) -> str:
    """A text that an encoder can take.

    Args:
        text: What the client sent.
        where: The field, for the message.
        most: How many characters it may have.

    Raises:
        ProblemError: 422 where it is empty, too long, or no valid Unicode.
    """
    if not text.strip():
        raise ProblemError(422, f"{where}: the text is empty; give a few words")
    if len(text) > most:
        raise ProblemError(422, f"{where}: the text has {len(text)} characters; at most {most} are accepted")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON's escapes can write
        raise ProblemError(422, f"{where}: the text is not valid Unicode (half a surrogate pair)") from None
    return text
