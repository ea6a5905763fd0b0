"""An OpenAI client that measures: streams of many requests at once, each token with its time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

PATH = "/v1/completions"
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30)


@dataclass
class Reply:
    """What came for one request. Times are of `time.perf_counter`, in seconds."""

    due: float  # when it was to be sent
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each token
    logprobs: list[float] = field(default_factory=list)  # where they were asked for
    ends: int = 0  # choices that said why they ended
    closed: int = 0  # `[DONE]`s
    error: str | None = None  # instead of an end

    @property
    def whole(self) -> bool:
        return self.ends == self.closed == 1 and self.error is None

    @property
    def ttft(self) -> float:
        """Seconds from when it was due to its first token: a client that is late counts too."""
        return self.times[0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; those that came together have 0 between them."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@contextlib.asynccontextmanager
async def connections() -> AsyncIterator[aiohttp.ClientSession]:
    """As many as there are requests, each closed behind its answer."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=_TIMEOUT
    ) as session:
        yield session


async def send_all(url: str, bodies: Sequence[Mapping[str, Any]], at_s: Sequence[float]) -> list[Reply]:
    """`bodies[i]` is sent `at_s[i]` seconds from now, whatever has become of the others."""
    async with connections() as session:
        start = time.perf_counter()
        asked = (ask(session, url, body, start + at) for body, at in zip(bodies, at_s, strict=True))
        return list(await asyncio.gather(*asked))


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    due: float | None = None,
    most_tokens: int | None = None,
) -> Reply:
    """One completion when it is due. Errors are the reply's, not raised. `most_tokens`: then go away."""
    reply = Reply(time.perf_counter() if due is None else due)
    await asyncio.sleep(reply.due - time.perf_counter())
    try:
        async with session.post(url + PATH, json=body) as response:
            if response.status != 200:
                reply.error = f"{response.status}: {(await response.text())[:300]}"
            elif response.content_type != "text/event-stream":
                _take(reply, await response.json(), time.perf_counter())
                reply.closed = 1
            else:
                async for data in events(response.content):
                    _event(reply, data)
                    if most_tokens is not None and len(reply.tokens) >= most_tokens:
                        break
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    return reply


async def events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event."""
    rest = b""
    async for piece in content.iter_any():
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    yield line[6:]


def _event(reply: Reply, data: bytes) -> None:
    if data == b"[DONE]":
        reply.closed += 1
    else:
        _take(reply, json.loads(data), time.perf_counter())


def _take(reply: Reply, chunk: dict[str, Any], now: float) -> None:
    if "error" in chunk:
        reply.error = str(chunk["error"].get("message"))[:300]
    for choice in chunk.get("choices", ()):
        new = choice.get("token_ids") or []
        reply.tokens += new
        reply.times += [now] * len(new)
        reply.logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
        reply.ends += choice.get("finish_reason") is not None
