"""A server for a long time: requests that come again and again must get the same tokens and log-prob bits.

A pool of requests is asked one by one first, which says what each answer is. Then they arrive at random:
most are deterministic, some ordinary, some clients go away in the middle. Replicas may be killed meanwhile.
What is counted: answers that differ, that were lost, or that came twice, and how memory grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from llm42c.errors import ConfigError
from llm42c.runtime.bench.arrivals import Arrival
from llm42c.runtime.bench.client import Reply, ask, connections
from llm42c.runtime.bench.servers import MODEL, HttpServer
from llm42c.runtime.bench.serving import Progress

_ORDINARY, _LEAVING, _SAMPLED = 0.2, 0.1, 0.5  # shares of requests
_SAMPLE_S = 2.0  # between two looks at the memory
_REFUSED = ("429", "503")

Answer = tuple[list[int], list[float]]


@dataclass
class SoakResult:
    """`lost`: without a whole answer though nobody left. `broken`: ordinary streams that a killed replica
    took along, and said so."""

    minutes: float
    qps: float
    counts: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    ttfts: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds, bytes
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(self.counts[name] for name in ("differ", "lost", "doubled"))

    def slope(self) -> float:
        """Bytes an hour, by least squares over the second half: the first fills caches."""
        half = self.memory[len(self.memory) // 2 :]
        if len(half) < 3:
            return 0.0
        seconds, held = np.array(half, dtype=np.float64).T
        return float(np.polyfit(seconds, held, 1)[0]) * 3600

    def as_row(self) -> dict[str, Any]:
        names = ("asked", "deterministic", "ordinary", "left", "refused", "broken", "tokens")
        held = [size / 2**20 for _, size in self.memory] or [0.0]
        return {
            "minutes": round(self.minutes, 2),
            "qps": round(self.qps, 3),
            **{name: self.counts[name] for name in (*names, "differ", "lost", "doubled")},
            "kills": self.kills,
            "resumed": int(self.metrics.get("resumed", 0)),
            "ttft_p50_ms": round(float(np.percentile(self.ttfts or [0.0], 50)) * 1000, 1),
            "ttft_p99_ms": round(float(np.percentile(self.ttfts or [0.0], 99)) * 1000, 1),
            "memory_start_mb": round(held[0]),
            "memory_end_mb": round(held[-1]),
            "memory_mb_per_hour": round(self.slope() / 2**20, 1),
        }


class ServerSoak:
    """`pool`: what is asked. Its lengths count, its times do not."""

    def __init__(self, server: HttpServer, pool: Sequence[Arrival], seed: int = 0) -> None:
        self._server, self._rng = server, random.Random(seed)
        self._bodies = [self._body(i, arrival) for i, arrival in enumerate(pool)]
        self._expected: list[Answer] = []

    def _body(self, index: int, arrival: Arrival) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": list(arrival.prompt),
            "max_tokens": arrival.new_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "logprobs": 0,
            "temperature": 0.0,
            "deterministic": True,
        }
        sampled = self._rng.random() < _SAMPLED
        return body | {"temperature": 0.8, "seed": index} if sampled else body

    def run(self, minutes: float, qps: float, kills: int, progress: Progress) -> SoakResult:
        """Raises ConfigError for a server that does not answer one request after the other."""
        return asyncio.run(self._run(SoakResult(minutes, qps), kills, progress))

    async def _run(self, result: SoakResult, kills: int, progress: Progress) -> SoakResult:
        async with connections() as session:
            await self._ask_alone(session, progress)
            watching = asyncio.ensure_future(self._watch(result, kills, progress))
            try:
                await self._ask_all(session, result)
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
        result.memory.append((result.minutes * 60, self._server.resident_bytes()))
        result.metrics = self._server.counters()
        return result

    async def _ask_alone(self, session: aiohttp.ClientSession, progress: Progress) -> None:
        for i, body in enumerate(self._bodies):
            progress("alone", i, len(self._bodies))
            reply = await ask(session, self._server.url, body)
            if not reply.whole:
                raise ConfigError(f"{self._server.name} did not answer a request: {reply.error}")
            self._expected.append((reply.tokens, reply.logprobs))

    async def _ask_all(self, session: aiohttp.ClientSession, result: SoakResult) -> None:
        due, end = time.perf_counter(), time.perf_counter() + result.minutes * 60
        asked: set[asyncio.Task[None]] = set()
        while (due := due + self._rng.expovariate(result.qps)) < end:
            await asyncio.sleep(due - time.perf_counter())
            one = asyncio.ensure_future(self._ask_one(session, result, due))
            asked.add(one)
            one.add_done_callback(asked.discard)
        await asyncio.gather(*asked)

    async def _ask_one(self, session: aiohttp.ClientSession, result: SoakResult, due: float) -> None:
        index = self._rng.randrange(len(self._bodies))
        body, count = self._bodies[index], self._bodies[index]["max_tokens"]
        ordinary = self._rng.random() < _ORDINARY
        most = self._rng.randint(1, count) if self._rng.random() < _LEAVING else None
        reply = await ask(session, self._server.url, body | {"deterministic": not ordinary}, due, most)
        judge(result.counts, reply, None if ordinary else self._expected[index], count, most)
        if reply.times:
            result.ttfts.append(reply.ttft)

    # -- memory and kills ------------------------------------------------------------------------------------

    async def _watch(self, result: SoakResult, kills: int, progress: Progress) -> None:
        """Looks at the memory, and kills replicas in equal intervals."""
        start, seconds = time.perf_counter(), result.minutes * 60
        while True:
            now = time.perf_counter() - start
            progress("soak", min(int(now), int(seconds)), int(seconds))
            if not kills:  # a replica that comes back has the memory of a new one
                result.memory.append((now, await asyncio.to_thread(self._server.resident_bytes)))
            if result.kills < kills and now >= (result.kills + 0.5) * seconds / kills:
                result.kills += await asyncio.to_thread(self._kill)
            await asyncio.sleep(min(_SAMPLE_S, seconds / 20, seconds / kills / 4 if kills else _SAMPLE_S))

    def _kill(self) -> bool:
        """One that is at work, if another one is there."""
        up = [replica for replica in self._server.state()["replicas"] if replica["pid"] is not None]
        busy = [replica for replica in up if replica["requests"]]
        if len(up) < 2 or not busy:
            return False
        os.kill(self._rng.choice(busy)["pid"], signal.SIGKILL)
        return True


def judge(counts: Counter[str], reply: Reply, expected: Answer | None, count: int, most: int | None) -> None:
    """Count what became of a request for `count` tokens, of which the client wanted `most`, if not all.
    `expected`: what a deterministic one must get."""
    counts["asked"] += 1
    counts["ordinary" if expected is None else "deterministic"] += 1
    counts["tokens"] += len(reply.tokens)
    left = most is not None and len(reply.tokens) >= most and reply.error is None
    if reply.error is not None and reply.error.startswith(_REFUSED):
        counts["refused"] += 1
        return
    if reply.ends > 1 or reply.closed > 1 or len(reply.tokens) > count:
        counts["doubled"] += 1
    elif expected is None and reply.error is not None and "ordinary stream" in reply.error:
        counts["broken"] += 1
    elif left:
        counts["left"] += 1
    elif not reply.whole or len(reply.tokens) != count:
        counts["lost"] += 1
    if expected is not None:
        tokens, logprobs = expected
        same = reply.tokens == tokens[: len(reply.tokens)]
        counts["differ"] += not (same and reply.logprobs == logprobs[: len(reply.logprobs)])
