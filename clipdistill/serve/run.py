"""The process: a socket, a uvicorn server on it, and a stop that finishes what has begun."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from clipdistill.core.errors import ConfigError
from clipdistill.serve.protocol import BoundedHttp

_log = logging.getLogger("clipdistill")
_GRACE_S = 30
_BACKLOG = 256


def run(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGINT or SIGTERM; then take no more connections, finish the open requests, and return.

    Neither addresses nor queries are logged.

    Args:
        app: The application.
        host: The address to listen on.
        port: The port; 0 = any free one, which the log names.

    Raises:
        ConfigError: If the address cannot be listened on.
    """
    listening = _listen(host, port)
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=15,
    )
    shown = f"[{host}]" if ":" in host else host
    _log.info("serve: http://%s:%d", shown, listening.getsockname()[1])
    if not is_loopback(host):
        _log.warning("serve: %s is open to other machines, without a password and without encryption", shown)
    server = uvicorn.Server(config)
    with _stopped_by_signals(server):
        server.run(sockets=[listening])


@contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Let a signal be an order to stop and nothing more: uvicorn raises it again once all is finished.

    So a service that was told to stop, and did, ends as a success.
    """

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio sends without delay (TCP_NODELAY) only where it is: else an answer's head
    # and body, two small packets, would cost each client the 40 ms of its delayed acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as fault:
        listening.close()
        text = getattr(fault, "strerror", None) or str(fault)
        raise ConfigError(f"--host {host} --port {port}: cannot listen there: {text}") from fault
    return listening
