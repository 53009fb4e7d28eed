"""What stands around every answer: the host check, the security headers, the counters, and the last resort."""

from __future__ import annotations

import logging
import time
from typing import final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipdistill.serve.metrics import Metrics
from clipdistill.serve.problems import ProblemError, problem_response

_log = logging.getLogger("clipdistill")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Where an answer sets one itself, that stays: the page has a policy of its own, thumbnails may be kept."""
_RAW = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]


@final
class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: The application.
        metrics: Told of each answer.
        hosts: The names that ``Host`` may say, without port; empty = any.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: tuple[str, ...]) -> None:
        self._app, self._metrics = app, metrics
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                set_already = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(each for each in _RAW if each[0] not in set_already)]
            await send(message)

        try:
            await self._answer(scope, receive, sending)
        except Exception:  # a fault of ours: it is logged here, and the client is told no more than that
            _log.exception("serve: an unexpected fault")
            if status:
                raise
            await problem_response(ProblemError(500, "the service failed; its log says why"))(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.answered(route, scope["method"], status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = _without_port(Headers(scope=scope).get("host", ""))
        if self._hosts and host not in self._hosts:
            problem = ProblemError(
                421, "the Host header names no host that this service answers for (see --allow-host)"
            )
            await problem_response(problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).strip("[]").lower()
