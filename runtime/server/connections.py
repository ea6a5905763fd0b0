"""One client's connection: how long it may be silent, and who goes when there are too many.

uvicorn waits for a request's head, and for a body that nobody reads, as long as the client likes.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_OTHER_FILES = 128  # that the process may need
# What is written ahead of a client, in the process and in the system, which takes megabytes if it may.
# Whoever reads nothing has no more made for it.
_AHEAD_BYTES = 2**14
_SYSTEM_AHEAD_BYTES = 2**15


class Connection(H11Protocol):
    """HTTP/1.1. One that brings no whole head within `head_timeout_s` is closed, and so is, of more than
    `most`, the one that has let the server wait longest. Who is being answered stays."""

    head_timeout_s = 30.0
    most = 1000
    _waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_AHEAD_BYTES)
        raw = transport.get_extra_info("socket")
        if raw.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > 2 * _SYSTEM_AHEAD_BYTES:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SYSTEM_AHEAD_BYTES)  # which Linux doubles
        self._watch()
        if len(self.connections) > self.most:
            waiting = [c for c in self.connections if isinstance(c, Connection) and c._waits is not None]
            min(waiting, key=lambda c: c._since, default=self)._cut()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    @property
    def _since(self) -> float:
        return float("inf") if self._waits is None else self._waits.when()

    def _watch(self) -> None:
        """The clock runs while nothing is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._waits is None and not self.transport.is_closing():
            self._waits = self.loop.call_later(self.head_timeout_s, self._cut)

    def _stop(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None

    def _cut(self) -> None:
        self._stop()
        self.transport.abort()


def patient(head_timeout_s: float, most: int | None = None) -> type[Connection]:
    """A class of connections for uvicorn's `http`. `most`: by default what the process's limit of open files
    leaves."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = 2**16 if files == resource.RLIM_INFINITY else max(16, files - _OTHER_FILES)
    return type(
        "Connection", (Connection,), {"head_timeout_s": head_timeout_s, "most": min(most or room, room)}
    )
