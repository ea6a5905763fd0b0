"""One client's request: which replicas work on it, and what the client gets of that.

Of a stream every event is sent once, in order, whoever computed it: a deterministic stream goes on at another
replica behind the last event that was sent, as `Last-Event-ID` says it. What has sent nothing is asked again,
of whatever kind it is; an ordinary stream that breaks ends with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator

from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.replicas.call import Call, Head, LostError, Piece, Replica
from llm42c.runtime.server.replicas.places import Place, Places
from llm42c.runtime.server.stream import DONE

MOST_LOSSES = 3  # of one request without an event in between: perhaps it is what kills them
_FULL, _CLOSED = 429, 503
_FULL_S = 0.1  # until a replica that was full is asked again
_LAST_ID = b"last-event-id"

_log = logging.getLogger(__name__)

News = Head | Piece | LostError | ApiError | None  # None: the end


class Attempt:
    """The request at one replica; what comes goes to `news`."""

    def __init__(self, place: Place, call: Call, news: asyncio.Queue[tuple[Attempt | None, News]]) -> None:
        self.place = place
        self.head: Head | None = None
        self.data: list[bytes] = []  # of an answer that is no stream
        self.tokens: list[list[int]] = []  # committed, of each choice
        self._news = news
        self._pump = asyncio.ensure_future(self._run(place.replica, call))
        place.attempts[self] = self._tell

    @property
    def streams(self) -> bool:
        """Whether what comes are events."""
        return self.head is not None and any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in self.head.headers
        )

    def take(self, piece: Piece) -> None:
        self.tokens = self.tokens or [[] for _ in piece.tokens]
        for tokens, new in zip(self.tokens, piece.tokens, strict=True):
            tokens += new

    async def close(self) -> None:
        """Ends the request there."""
        self.place.attempts.pop(self, None)
        self._pump.cancel()
        await asyncio.wait({self._pump})

    def _tell(self, news: News) -> None:
        self._news.put_nowait((self, news))

    async def _run(self, replica: Replica, call: Call) -> None:
        try:
            async with contextlib.aclosing(replica.ask(call)) as messages:
                async for message in messages:
                    self._tell(message)
            self._tell(None)
        except LostError as error:
            self._tell(error)
        except Exception as error:
            _log.error("%s failed at %s", call.path, self.place.name, exc_info=error)
            self._tell(ApiError(502, f"{self.place.name} failed: {type(error).__name__}: {error}"[:300]))


class Relay:
    """One request. `again`: it is deterministic, so that whoever goes on gives the same bytes. To be made in
    the event loop."""

    def __init__(self, places: Places, call: Call, *, again: bool, timeout_s: float, hedge_s: float | None):
        self.resumed = self.hedged = 0
        self._places, self._call, self._again = places, call, again
        self._timeout_s, self._hedge_s = timeout_s, hedge_s
        self._deadline = self._now() + timeout_s
        self._news: asyncio.Queue[tuple[Attempt | None, News]] = asyncio.Queue()
        self._attempts: list[Attempt] = []
        self._known: list[list[int]] = []  # tokens of each choice that any of them has committed
        self._last_id: bytes | None = None  # of the events that were sent
        self._begun = self._done = False
        self._losses = 0

    def end(self, error: ApiError) -> None:
        """From outside: nobody works on it any more."""
        self._news.put_nowait((None, error))

    async def answer(self) -> AsyncGenerator[Head | bytes]:
        """A head, then bytes. Raises ApiError: instead of an answer, or in the middle of it."""
        try:
            await self._start()
            while not self._done:
                async for message in self._handled(*await self._next()):
                    yield message
        finally:
            await self._leave(self._attempts)

    @property
    def broken(self) -> bool:
        """Whether what was sent cannot be gone on with."""
        return self._begun and self._last_id is None

    # -- attempts --------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        """At whichever is best, once one is there. Raises ApiError."""
        try:
            async with asyncio.timeout_at(self._deadline):
                place = await self._places.wait()
        except TimeoutError:
            raise self._late() from None
        self._attempts.append(Attempt(place, self._asked(), self._news))

    def _asked(self) -> Call:
        """The request from where the client is."""
        if self._last_id is None:
            return self._call
        headers = tuple(header for header in self._call.headers if header[0] != _LAST_ID)
        return dataclasses.replace(
            self._call,
            headers=(*headers, (_LAST_ID, self._last_id)),
            drafts=tuple(map(tuple, self._known)),
        )

    async def _next(self) -> tuple[Attempt | None, News]:
        """What comes next, of whichever attempt; where nothing comes for a while, another one begins. Raises
        ApiError."""
        while True:
            hedging = self._again and not self.broken and len(self._attempts) == 1
            patience = self._hedge_s if hedging and self._hedge_s is not None else math.inf
            try:
                async with asyncio.timeout_at(min(self._deadline, self._now() + patience)):
                    attempt, news = await self._news.get()
            except TimeoutError:
                if self._now() >= self._deadline:
                    raise self._late() from None
                self._hedge(self._attempts[0].place)
                continue
            if attempt is None or attempt in self._attempts:
                return attempt, news

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _late(self) -> ApiError:
        message = f"the request took longer than {self._timeout_s:g} s"
        return ApiError(504, message, "timeout", "deadline_exceeded")

    def _hedge(self, slow: Place) -> None:
        """Ask one that has less to do than the slow one: what is slow everywhere is not doubled."""
        place = self._places.best(besides=[slow])
        if place is not None and len(place.attempts) < len(slow.attempts):
            self.hedged += 1
            self._attempts.append(Attempt(place, self._asked(), self._news))

    async def _leave(self, attempts: list[Attempt]) -> None:
        """Ends them; those that are left go on."""
        self._attempts = [attempt for attempt in self._attempts if attempt not in attempts]
        for attempt in attempts:
            await attempt.close()

    # -- what comes ------------------------------------------------------------------------------------------

    async def _handled(self, attempt: Attempt | None, news: News) -> AsyncIterator[Head | bytes]:
        """What of the news is the client's. Raises ApiError."""
        if isinstance(news, ApiError):
            raise news
        assert attempt is not None
        if isinstance(news, LostError):
            self._places.lost(attempt.place, str(news))
            await self._lost(attempt)
        elif isinstance(news, Head):
            attempt.head = news
            if news.status == _CLOSED:
                await self._lost(attempt)
            elif news.status != 200 and (self._begun or len(self._attempts) > 1):
                await self._refused(attempt, news.status)
        elif isinstance(news, Piece) and not attempt.streams:
            attempt.data.append(news.data)
        else:
            await self._leave([other for other in self._attempts if other is not attempt])
            if not self._begun:
                assert attempt.head is not None
                self._begun = True
                yield attempt.head
            if isinstance(news, Piece):
                yield self._event(attempt, news)
            else:
                self._done = True
                yield b"".join(attempt.data)

    def _event(self, attempt: Attempt, piece: Piece) -> bytes:
        """Events that are sent now."""
        attempt.take(piece)
        if sum(map(len, attempt.tokens)) > sum(map(len, self._known)):
            self._known = attempt.tokens
        self._last_id = last_id(piece.data) or self._last_id
        self._losses = 0
        self._done = piece.data.endswith(DONE)
        return piece.data

    async def _lost(self, attempt: Attempt) -> None:
        """Goes on elsewhere, unless another attempt does already. Raises ApiError where nobody can."""
        await self._leave([attempt])
        if self._attempts:
            return
        self._losses += 1
        if self.broken:
            message = f"{attempt.place.name} is gone, and an ordinary stream cannot go on elsewhere"
            raise ApiError(502, message, code="replica_lost")
        if self._losses >= MOST_LOSSES:
            message = f"{self._losses} replicas were lost while they worked on this request"
            raise ApiError(502, message, code="replica_lost")
        self.resumed += self._begun
        await self._start()

    async def _refused(self, attempt: Attempt, status: int) -> None:
        """One that does not want to go on, or to help."""
        await self._leave([attempt])
        if self._attempts:
            return
        if status != _FULL:
            raise ApiError(502, f"{attempt.place.name} does not go on with the stream: {status}")
        await asyncio.sleep(_FULL_S)
        await self._start()


def last_id(events: bytes) -> bytes | None:
    """The id of the last of whole events that has one."""
    for event in reversed(events.split(b"\n\n")):
        if event.startswith(b"id: "):
            return event[4:].partition(b"\n")[0]
    return None
