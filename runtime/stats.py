"""Counters of one engine. Plain numbers, cheap to bump, printed by `as_dict`; and how full it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Load:
    """How full an engine is at a moment."""

    running: int  # requests that hold pages
    waiting: int
    pages: int  # for keys and values
    pages_in_use: int  # of them; what is only cached can be taken at any time


@dataclass(slots=True)
class Stats:
    steps: int = 0
    fast_steps: int = 0
    verifier_steps: int = 0
    fast_tokens: int = 0  # rows computed by the fast graph, padding excluded
    fast_padding: int = 0
    verifier_tokens: int = 0
    verifier_padding: int = 0

    certified_tokens: int = 0  # committed by a certified bucket without replay
    verified_tokens: int = 0  # committed by the verifier graph
    ordinary_tokens: int = 0  # of requests that did not ask for determinism
    speculated_tokens: int = 0  # proposed by a speculative bucket
    rollbacks: int = 0
    drafted_tokens: int = 0  # proposed by drafts and checked
    accepted_drafts: int = 0  # of them, those that were right
    draft_weight_bytes: int = 0  # memory of draft models
    draft_kv_bytes: int = 0  # caches that draft models have of their own
    drafter_failures: int = 0  # a drafter raised, was late, or gave what are no token ids
    recomputed_tokens: int = 0  # proposals thrown away, by rollback or preemption
    preemptions: int = 0
    prefix_hits: int = 0  # pages taken from the canonical prefix cache
    prefix_hit_tokens: int = 0

    graph_captures: int = 0  # CUDA graphs: shapes that have one
    graph_replays: int = 0
    graph_misses: int = 0  # steps without one, run call by call

    probes: int = 0
    spot_checks: int = 0  # of what is certified by construction
    probe_failures: int = 0  # broken off by an exception; the shape is verified instead
    audits: int = 0
    audited_tokens: int = 0
    revocations: int = 0
    suspects: list[str] = field(default_factory=list)  # finished on a certificate that was revoked later

    finished: int = 0
    failed: int = 0
    aborted: int = 0

    seconds_fast: float = 0.0
    seconds_verify: float = 0.0
    seconds_sample: float = 0.0
    seconds_draft: float = 0.0  # passes of draft models
    seconds_probe: float = 0.0
    seconds_spot: float = 0.0  # of it, for spot checks
    seconds_total: float = 0.0

    @property
    def certified_share(self) -> float:
        """Share of deterministic tokens that were committed without replay."""
        total = self.certified_tokens + self.verified_tokens
        return self.certified_tokens / total if total else 0.0

    @property
    def seconds_overhead(self) -> float:
        """Time of the engine's own Python: everything but graphs, draft models, the sampler and probing."""
        graphs = self.seconds_fast + self.seconds_verify + self.seconds_draft
        return self.seconds_total - graphs - self.seconds_sample - self.seconds_probe

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "certified_share": self.certified_share,
            "seconds_overhead": self.seconds_overhead,
        }
