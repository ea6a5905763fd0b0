"""Servers under load: the same arrivals for each of them, in turns."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm42c.errors import ConfigError
from llm42c.runtime.bench.arrivals import Arrival, arrivals
from llm42c.runtime.bench.client import Reply, send_all
from llm42c.runtime.bench.servers import COUNTERS, MODEL, HttpServer

Progress = Callable[[str, int, int], None]
CLASSES = ("ordinary", "deterministic")


@dataclass(frozen=True)
class Slo:
    """A request is good if its first token comes in time, and the others in time on average."""

    ttft_s: float = 1.0
    tbt_s: float = 0.1

    def good(self, reply: Reply) -> bool:
        gaps = reply.gaps
        return reply.ttft <= self.ttft_s and (not gaps or statistics.fmean(gaps) <= self.tbt_s)


@dataclass(frozen=True)
class Load:
    """What does not change within a sweep."""

    trace: str
    count: int  # requests of one turn
    seed: int = 0
    scale: float = 1.0
    max_model_len: int = 8192
    vocabulary: tuple[int, int] = (100, 49000)

    def arrivals(self, qps: float, percent: int, contents: int) -> list[Arrival]:
        return arrivals(
            self.trace,
            self.count,
            qps,
            percent,
            seed=self.seed,
            contents=contents,
            scale=self.scale,
            max_model_len=self.max_model_len,
            vocabulary=self.vocabulary,
        )


@dataclass
class Contender:
    """A server, and how many in a hundred requests ask it for determinism; None: it knows no such thing."""

    server: HttpServer
    percent: int | None

    @property
    def name(self) -> str:
        return self.server.name

    def body(self, arrival: Arrival) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": list(arrival.prompt),
            "max_tokens": arrival.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        return body if self.percent is None else body | {"deterministic": arrival.deterministic}

    def run(self, asked: Sequence[Arrival]) -> Turn:
        """Ask while all others stand still. Raises ConfigError if an answer is missing or too short."""
        self.server.held.resume()
        before = Counter(self.server.counters())
        bodies = [self.body(arrival) for arrival in asked]
        replies = asyncio.run(send_all(self.server.url, bodies, [arrival.at_s for arrival in asked]))
        spent = Counter(self.server.counters())
        spent.subtract(before)
        self.server.held.pause()
        for reply, arrival in zip(replies, asked, strict=True):
            if not reply.whole or len(reply.tokens) != arrival.new_tokens:
                why = reply.error or f"{len(reply.tokens)} of {arrival.new_tokens} tokens came"
                raise ConfigError(f"{self.name} did not answer a request: {why}")
        return Turn(replies, [arrival.deterministic for arrival in asked], dict(spent))


@dataclass(frozen=True)
class Turn:
    """All requests of one load, once."""

    replies: list[Reply]
    deterministic: list[bool]
    counters: dict[str, float]

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(r.times[-1] for r in self.replies) - min(r.due for r in self.replies)

    @property
    def request_rate(self) -> float:
        return len(self.replies) / self.seconds

    @property
    def token_rate(self) -> float:
        return sum(len(r.tokens) for r in self.replies) / self.seconds

    def good_rate(self, slo: Slo) -> float:
        return sum(map(slo.good, self.replies)) / self.seconds

    def of(self, deterministic: bool) -> list[Reply]:
        return [r for r, d in zip(self.replies, self.deterministic, strict=True) if d == deterministic]


@dataclass
class Result:
    """All turns of one contender at one load and rate."""

    load: Load
    qps: float
    contender: Contender
    slo: Slo
    turns: list[Turn] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        percent = self.contender.percent
        row: dict[str, Any] = {
            "trace": self.load.trace,
            "scale": self.load.scale,
            "requests": self.load.count,
            "qps": "inf" if math.isinf(self.qps) else round(self.qps, 3),
            "engine": self.contender.name,
            "deterministic_percent": "" if percent is None else percent,
            "rounds": len(self.turns),
            "requests_s": round(self._median(lambda turn: turn.request_rate), 3),
            "out_tok_s": round(self._median(lambda turn: turn.token_rate), 1),
            "goodput_s": round(self._median(lambda turn: turn.good_rate(self.slo)), 3),
            "slo_ttft_ms": self.slo.ttft_s * 1000,
            "slo_tbt_ms": self.slo.tbt_s * 1000,
        }
        row |= _latencies("", [reply for turn in self.turns for reply in turn.replies])
        for deterministic, name in enumerate(CLASSES):
            replies = [reply for turn in self.turns for reply in turn.of(bool(deterministic))]
            row |= _latencies(f"{name}_", [] if percent is None else replies)
        total: Counter[str] = Counter()
        for turn in self.turns:
            total.update(turn.counters)
        return row | {name: int(total[name]) if total else "" for name in COUNTERS}

    def _median(self, of: Callable[[Turn], float]) -> float:
        return statistics.median(map(of, self.turns))


def _latencies(prefix: str, replies: Sequence[Reply]) -> dict[str, Any]:
    """Percentiles in ms over all requests (TTFT) and over all tokens (TBT)."""
    values = {"ttft": [r.ttft for r in replies], "tbt": [gap for r in replies for gap in r.gaps]}
    return {
        f"{prefix}{name}_p{q}_ms": round(float(np.percentile(found, q)) * 1000, 1) if found else ""
        for name, found in values.items()
        for q in (50, 99)
    }


@dataclass(frozen=True)
class Rate:
    """Requests a second; or, as a share, of the rate at which the reference is saturated."""

    value: float
    of_saturation: bool = False

    @staticmethod
    def parse(text: str) -> Rate:
        """`2.5`, `inf` or `80%`. Raises ConfigError."""
        try:
            share = text.endswith("%")
            value = float(text.removesuffix("%")) / (100 if share else 1)
        except ValueError:
            value = math.nan
        if not value > 0 or (share and math.isinf(value)):
            raise ConfigError(f"--qps takes numbers above 0, inf, or shares such as 80%, not {text!r}")
        return Rate(value, share)


class Sweep:
    """Contenders at several rates; `reference` is whose saturation shares are of."""

    def __init__(self, contenders: Sequence[Contender], reference: Contender, slo: Slo) -> None:
        self._contenders, self._reference, self._slo = contenders, reference, slo
        self._contents = 0  # no prompt comes twice
        for contender in contenders:
            contender.server.held.pause()

    def run(
        self, load: Load, rates: Sequence[Rate], rounds: int, progress: Progress
    ) -> Iterator[list[Result]]:
        """One list a rate. Raises ConfigError."""
        progress(f"{load.trace}: warming up", 0, 0)
        for server in {id(c.server): c for c in self._contenders}.values():
            self._turn(server, Load(load.trace, 8, scale=min(load.scale, 0.1), vocabulary=load.vocabulary))
        saturated: float | None = None
        for rate in sorted(rates, key=lambda rate: -rate.value if not rate.of_saturation else 0):
            if rate.of_saturation and saturated is None:
                progress(f"{load.trace}: saturation of {self._reference.name}", 0, 0)
                saturated = self._turn(self._reference, load).request_rate
            qps = rate.value * (saturated or 1.0) if rate.of_saturation else rate.value
            results = self._measure(load, qps, rounds, progress)
            if math.isinf(qps):
                (reference,) = (r for r in results if r.contender is self._reference)
                saturated = statistics.median(turn.request_rate for turn in reference.turns)
            yield results

    def _measure(self, load: Load, qps: float, rounds: int, progress: Progress) -> list[Result]:
        results = [Result(load, qps, contender, self._slo) for contender in self._contenders]
        label = f"{load.trace}, {qps:.3g} requests/s"
        for i in range(rounds):
            # Every other round runs backwards: whoever comes after the slowest finds the coldest caches.
            for done, result in enumerate(results[:: -1 if i % 2 else 1]):
                progress(label, i * len(results) + done, rounds * len(results))
                result.turns.append(self._turn(result.contender, load, qps))
        progress(label, rounds * len(results), rounds * len(results))
        return results

    def _turn(self, contender: Contender, load: Load, qps: float = math.inf) -> Turn:
        self._contents += 1
        return contender.run(load.arrivals(qps, contender.percent or 0, self._contents))
