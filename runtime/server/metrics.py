"""What /metrics shows, in a registry of its own: nothing of it is the process's."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput

TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TBT_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
CLASSES = ("ordinary", "deterministic")


class Metrics:
    """TTFT is from a request's arrival to its first committed token, TBT between tokens that follow; a step
    that commits several at once counts the others with 0."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self._registry}
        ttft = Histogram("llm42_ttft_seconds", "Time to first token", ["class"], buckets=TTFT_S, **common)
        tbt = Histogram("llm42_tbt_seconds", "Time between tokens", ["class"], buckets=TBT_S, **common)
        self._ttft = [ttft.labels(name) for name in CLASSES]
        self._tbt = [tbt.labels(name) for name in CLASSES]
        self.shared = Counter("llm42_requests_shared", "Answered by the run of an equal request", **common)
        self.refused = Counter("llm42_requests_refused", "Turned away: the queue was full", **common)
        self.aborted = Counter("llm42_requests_aborted", "Nobody waited for them any more", **common)
        self.cached = Counter("llm42_requests_cached", "Answered from the cache", **common)
        self._registry.register(_EngineMetrics(engine))
        self._engine, self._started = engine, time.monotonic()

    def tokens(self, deterministic: bool, before: int, output: RequestOutput, gap_s: float) -> None:
        """`output` came `gap_s` after what came before it: `before` tokens, or the arrival."""
        new = len(output.new_token_ids)
        if not new:
            return
        (self._tbt if before else self._ttft)[deterministic].observe(gap_s)
        for _ in range(new - 1):
            self._tbt[deterministic].observe(0.0)

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def snapshot(self) -> dict[str, Any]:
        """The engine's counters and load at a moment. `uptime_s` is for rates, from two of them."""
        stats, load = self._engine.stats(), self._engine.load()
        return {
            "uptime_s": time.monotonic() - self._started,
            "requests": {
                "running": load.running,
                "waiting": load.waiting,
                "finished": stats.finished,
                "failed": stats.failed,
                "aborted": stats.aborted,
            },
            "tokens": {
                "certified": stats.certified_tokens,
                "verified": stats.verified_tokens,
                "ordinary": stats.ordinary_tokens,
            },
            "drafts": {"drafted": stats.drafted_tokens, "accepted": stats.accepted_drafts},
            "rollbacks": {"count": stats.rollbacks, "recomputed_tokens": stats.recomputed_tokens},
            "kv": {"pages": load.pages, "pages_in_use": load.pages_in_use},
            "steps": stats.steps,
            "preemptions": stats.preemptions,
        }


class _EngineMetrics:
    """The engine's own counters, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats, load = self._engine.stats(), self._engine.load()
        tokens = CounterMetricFamily("llm42_tokens", "Committed tokens", labels=["origin"])
        for origin, count in (
            ("certified", stats.certified_tokens),
            ("verified", stats.verified_tokens),
            ("ordinary", stats.ordinary_tokens),
        ):
            tokens.add_metric([origin], count)
        yield tokens
        counters: tuple[tuple[str, str, float], ...] = (
            ("llm42_drafted_tokens", "Drafted and checked", stats.drafted_tokens),
            ("llm42_accepted_drafts", "Of them, those that were right", stats.accepted_drafts),
            ("llm42_rollbacks", "Verifications that took proposals back", stats.rollbacks),
            ("llm42_recomputed_tokens", "Proposals thrown away", stats.recomputed_tokens),
            ("llm42_preemptions", "Requests that lost their pages for a while", stats.preemptions),
            ("llm42_prefix_hit_tokens", "Prompt tokens found in the prefix cache", stats.prefix_hit_tokens),
            ("llm42_revocations", "Certificates revoked", stats.revocations),
            ("llm42_engine_steps", "Steps of the engine", stats.steps),
            ("llm42_requests_finished", "Requests that came to their end", stats.finished),
            ("llm42_requests_failed", "Requests that ended in an error", stats.failed),
        )
        yield from (CounterMetricFamily(name, text, value=value) for name, text, value in counters)
        gauges = (
            ("llm42_requests_running", "Requests that hold pages", load.running),
            ("llm42_requests_waiting", "Requests that wait for pages", load.waiting),
            ("llm42_kv_pages", "Pages for keys and values", load.pages),
            ("llm42_kv_pages_in_use", "Of them, those that requests hold", load.pages_in_use),
        )
        yield from (GaugeMetricFamily(name, text, value=value) for name, text, value in gauges)
