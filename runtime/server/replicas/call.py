"""A request on its way to a replica, and what comes back: the same whatever carries it there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import ASGIApp, Message

from llm42c.runtime.server.relayed import RELAYED, Relayed, Tokens


@dataclass(frozen=True)
class Call:
    """A request with its whole body. `drafts`: tokens of each choice that another replica has committed."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    drafts: Tokens = ()


@dataclass(frozen=True)
class Head:
    """How an answer begins."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Piece:
    """What comes then: of a stream whole events. `tokens`: committed since the last piece, of each choice."""

    data: bytes
    tokens: Tokens = ()


@dataclass(frozen=True)
class State:
    """What a replica says of itself when it is there. `refused`: why it cannot serve, in one line."""

    pid: int
    contract: str = ""  # as JSON
    refused: str | None = None


class LostError(Exception):
    """The replica is gone, and with it what it had not yet sent."""


class Replica(Protocol):
    """One engine somewhere, which is started anew when it dies."""

    name: str

    def watch(self) -> AsyncGenerator[State]:
        """Waits until it is there, then says so again and again. Raises LostError when it is gone."""
        ...

    def ask(self, call: Call) -> AsyncGenerator[Head | Piece]:
        """Raises LostError. Closing the iterator ends the request there."""
        ...


async def answered(app: ASGIApp, call: Call) -> AsyncGenerator[Head | Piece]:
    """`app`'s answer. What is there at once comes as one piece."""
    relayed, sent = Relayed(call.drafts), asyncio.Queue[Message | None]()
    body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if not body:
            await asyncio.get_running_loop().create_future()  # until it is cancelled
        return body.pop()

    async def send(message: Message) -> None:
        sent.put_nowait(message)

    running = asyncio.ensure_future(app(_scope(call, relayed), receive, send))
    running.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], tuple((bytes(k), bytes(v)) for k, v in message["headers"]))
                continue
            data = [message.get("body", b"")]
            while not sent.empty():
                if (message := sent.get_nowait()) is None:
                    sent.put_nowait(None)
                    break
                data.append(message.get("body", b""))
            if any(data):
                yield Piece(b"".join(data), relayed.news())
        await running
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await running


def _scope(call: Call, relayed: Relayed) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
        RELAYED: relayed,
    }
