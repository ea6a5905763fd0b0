"""Server-sent events of committed tokens, which another connection can go on with.

An event's id says what the stream is of, and how far each choice has come. A client whose connection broke
sends the same body with the last id as `Last-Event-ID`, to any server of the same contract, and gets the
bytes that were still to come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llm42c.runtime.server.answers import Answer
from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.flights import Flight, Reading

DONE = b"data: [DONE]\n\n"
MOST_BYTES = 2**13  # of one write: a slow reader's buffer holds no more than it must
_ID = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{16})\.([0-9]{1,12})\.([0-9fu,-]+)", re.ASCII)
_UNSENT, _ENDED, _OVER = "-", "f", "u"


@dataclass
class Cursor:
    """How far a choice has been sent: nothing (-1), or its opening and so many tokens; its end; and the usage
    of all behind the ends."""

    tokens: int = -1
    ended: bool = False
    over: bool = False

    def __str__(self) -> str:
        if self.ended:
            return _OVER if self.over else _ENDED
        return _UNSENT if self.tokens < 0 else str(self.tokens)

    @staticmethod
    def parse(text: str) -> Cursor:
        """Raises ValueError."""
        if text in (_UNSENT, _ENDED, _OVER):
            return Cursor(ended=text != _UNSENT, over=text == _OVER)
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise ValueError
        return Cursor(int(text))


@dataclass(frozen=True)
class EventId:
    """`key`: of what was asked, and of the contract; empty for what cannot be gone on with."""

    key: str
    nonce: str
    created: int
    cursors: tuple[str, ...]

    @staticmethod
    def fresh(key: str) -> EventId:
        return EventId(key, secrets.token_hex(8), int(time.time()), ())

    @staticmethod
    def parse(text: str, key: str, choices: int) -> EventId:
        """The id in `Last-Event-ID`. Raises ApiError."""
        if not key:
            raise ApiError(
                400, "Last-Event-ID: only streams of deterministic requests can go on", "Last-Event-ID"
            )
        try:
            parts = _ID.fullmatch(text)
            if parts is None:
                raise ValueError
            cursors = tuple(parts[4].split(","))
            for cursor in cursors:
                Cursor.parse(cursor)
            if len(cursors) != choices:
                raise ValueError
            found = EventId(parts[1], parts[2], int(parts[3]), cursors)
        except ValueError:
            raise ApiError(
                400, "Last-Event-ID is not one of this request's events", "Last-Event-ID"
            ) from None
        if found.key != key:
            message = "Last-Event-ID is of another request, or of a server of another contract"
            raise ApiError(409, message, "Last-Event-ID", "contract_mismatch")
        return found

    def prefix(self) -> str:
        return f"id: {self.key}.{self.nonce}.{self.created}."


class Events:
    """The events of one answer, from where `start` says on. Ends with the flights, or with an error event."""

    def __init__(self, answer: Answer, reading: Reading, start: EventId) -> None:
        self._answer, self._reading = answer, reading
        self._prefix = start.prefix() if start.key else ""
        self._cursors = [Cursor.parse(text) for text in start.cursors] or [Cursor() for _ in reading.flights]
        self._over = all(cursor.over for cursor in self._cursors)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        flights = self._reading.flights
        try:
            while not self._over:
                for data in self._fresh(flights):
                    yield data
                # What goes on behind the ends has the usage still to learn.
                if all(cursor.ended for cursor in self._cursors) and all(f.done for f in flights):
                    break
                self._reading.check()
                await self._reading.news()
            yield (b"" if self._over else self._usage(flights)) + DONE
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n".encode()

    def _fresh(self, flights: list[Flight]) -> Iterator[bytes]:
        """Events for all that has come and was not sent, in pieces."""
        events: list[bytes] = []
        for index, (cursor, flight) in enumerate(zip(self._cursors, flights, strict=True)):
            if cursor.ended:
                continue
            if cursor.tokens < 0:
                cursor.tokens = 0
                events.append(self._event(self._answer.opening(index)))
            while cursor.tokens < flight.shown:
                chunk = self._answer.token(index, flight, cursor.tokens)
                cursor.tokens += 1
                events.append(self._event(chunk))
                if len(events) * len(events[-1]) > MOST_BYTES:
                    yield b"".join(events)
                    events.clear()
            if flight.output is not None and flight.error is None:
                cursor.ended = True
                events.append(self._event(self._answer.closing(index, flight)))
        if events:
            yield b"".join(events)

    def _usage(self, flights: list[Flight]) -> bytes:
        for cursor in self._cursors:
            cursor.over = True
        return self._event(self._answer.last(flights))

    def _event(self, chunk: str | None) -> bytes:
        if chunk is None:
            return b""
        name = f"{self._prefix}{','.join(map(str, self._cursors))}\n" if self._prefix else ""
        return f"{name}data: {chunk}\n\n".encode()


class EventStream(Response):
    """Sends events as they come. A client that is gone, or takes nothing for `write_timeout_s`, ends it."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, reading: Reading, write_timeout_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._reading, self._write_timeout_s = events, reading, write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            sending = asyncio.ensure_future(self._send(send))
            await first_of(sending, gone(receive))
        finally:
            self._reading.leave()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        with contextlib.suppress(OSError, TimeoutError):  # nobody reads
            await send(start)
            async for data in self._events:
                if data:
                    await write(send, data, self._write_timeout_s)
            await write(send, b"", self._write_timeout_s)


async def write(send: Send, data: bytes, timeout_s: float) -> None:
    """A piece of a body; without data its end. Raises TimeoutError where nobody takes it."""
    async with asyncio.timeout(timeout_s):
        await send({"type": "http.response.body", "body": data, "more_body": bool(data)})


async def gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(work: asyncio.Future[Any], other: Any) -> bool:
    """Wait for `work`, cancelled if `other` returns first; whether it was `work`. Raises as it does."""
    watching = asyncio.ensure_future(other)
    try:
        await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return True
        return False
    finally:
        for task in (work, watching):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
