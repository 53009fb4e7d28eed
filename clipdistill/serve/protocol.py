"""HTTP/1.1 by httptools, with a bound on what a request may send besides its body."""

from __future__ import annotations

from typing import final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MOST = 64 << 10


@final
class BoundedHttp(HttpToolsProtocol):
    """uvicorn's fast protocol, which itself would keep request lines, headers and trailers without end.

    Bytes count until they complete a head, are part of a body or complete a message. A connection that sends more than
    64 KiB of others is answered 400 and closed.
    """

    _unused = 0

    def data_received(self, data: bytes) -> None:
        """Take in what has arrived."""
        self._unused += len(data)
        super().data_received(data)
        if self._unused > _MOST and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        """A head is complete."""
        self._unused = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body has arrived; an empty one is none."""
        self._unused = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        self._unused = 0
        super().on_message_complete()
