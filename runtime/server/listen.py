"""The socket, the signals, and the server's life from the first to the last request."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp

from llm42c.errors import ConfigError
from llm42c.runtime.server.connections import patient
from llm42c.runtime.server.settings import Settings

_AFTER_DRAIN_S = 5.0  # for error events of what was not finished
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use shows before a model is loaded; connections are taken when it is.
    Port 0 is any free one. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    """Raises ConfigError for a certificate or key that TLS cannot use."""
    if (certificate is None) != (key is None):
        raise ConfigError("a certificate and its key are given together")
    if certificate is None or key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ssl.SSLError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot use the certificate {certificate} with {key}: {why}") from None


class Served(Protocol):
    """What stands behind the application."""

    settings: Settings

    def drain(self) -> None:
        """Take no more requests."""
        ...

    def hand_over(self) -> None:
        """End those that are left."""
        ...


class Server(uvicorn.Server):
    """Ends at SIGTERM or SIGINT when accepted requests are finished, or their time is over; at a second
    signal at once."""

    def __init__(self, config: uvicorn.Config, served: Served, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._served, self._ready = served, ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was obeyed does not end the process once more."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._served.drain()
        over = asyncio.get_running_loop().call_later(self._served.settings.drain_s, self._served.hand_over)
        try:
            await super().shutdown(sockets)
        finally:
            over.cancel()


def serve(
    app: ASGIApp,
    served: Served,
    listener: socket.socket,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal. To be called in the main thread."""
    config = configured(app, served, ssl_certfile=certificate, ssl_keyfile=key)
    Server(config, served, ready).run(sockets=[listener])


def configured(app: ASGIApp, served: Served, **options: Any) -> uvicorn.Config:
    """How uvicorn serves `app`. `options`: more of uvicorn's."""
    settings = served.settings
    return uvicorn.Config(
        app,
        http=patient(settings.write_timeout_s, settings.max_connections),
        ws="none",
        log_config=None,  # how a process logs is its application's
        log_level="error",  # what a client does wrong is told to the client
        access_log=False,
        timeout_graceful_shutdown=int(settings.drain_s + _AFTER_DRAIN_S),
        server_header=False,
        **options,
    )
