"""Audits: replaying a sample of what certificates vouch for through the verifier graph.

An audit takes a random window of computed positions of a running request and compares KV bits, tokens and
log-prob bits. What differs names the shape that wrote it. That shape's certificate is revoked, and every
result that no verifier run has confirmed is taken back.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm42c.capture.packed import KVCache
from llm42c.errors import IntegrityError
from llm42c.parallel.ranks import ALONE, Ranks
from llm42c.runtime.accept import VERIFIER, prove, row_problem
from llm42c.runtime.block_pool import BlockPool, kv_rows_equal, read_kv
from llm42c.runtime.certificates import Certificates, named
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.packing import Chunk, Span, slots_of
from llm42c.runtime.request import Lease, Request, State
from llm42c.runtime.sampling import Sampled
from llm42c.runtime.scheduler import Scheduler, VerifyPlan
from llm42c.runtime.stats import Stats

_log = logging.getLogger(__name__)

REMEMBERED_FINISHES = 1024  # finished requests that a later revocation can still name


@dataclass(slots=True)
class Replay:
    """An audited chunk and the KV bits that its positions had before the verifier rewrote them."""

    chunk: Chunk
    slots: Tensor  # [N] int64
    before: list[Tensor]  # as from `read_kv`


class Auditor:
    def __init__(
        self,
        config: EngineConfig,
        cache: KVCache,
        pool: BlockPool,
        scheduler: Scheduler,
        certificates: Certificates,
        stats: Stats,
        ranks: Ranks = ALONE,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._cache = cache
        self._pool = pool
        self._scheduler = scheduler
        self._certificates = certificates
        self._stats = stats
        self._credit = 0.0  # certified positions that are due for an audit
        self._rng = np.random.default_rng(config.audit_seed)
        self._certified_finishes: deque[str] = deque(maxlen=REMEMBERED_FINISHES)

    def wrote(self, chunk: Chunk, origin: int) -> None:
        """Remember which shape wrote a chunk's positions, those of rejected drafts aside; certified ones earn
        audits."""
        size, lease = self._config.page_size, chunk.request.lease
        end = min(chunk.end, lease.num_computed)
        if chunk.num_tokens == 1:
            self._pool.origin[lease.pages[chunk.start // size], chunk.start % size] = origin
        else:
            positions = np.arange(chunk.start, end)
            self._pool.origin[lease.block_row[positions // size], positions % size] = origin
        if origin == VERIFIER:
            self._confirm_pages(lease)
        else:
            self._credit += self._config.audit_fraction * (end - chunk.start)

    def finished(self, request: Request) -> None:
        """The request left while some of its outputs rest on certificates alone."""
        if request.deterministic and request.history.proved < request.num_outputs:
            self._certified_finishes.append(request.id)

    def extend(self, plan: VerifyPlan | None) -> VerifyPlan | None:
        """Add a random window of certified positions to the verifier step, if one is due and fits."""
        due = self._config.verify_tokens
        if self._credit < due:
            return plan
        plan = plan or VerifyPlan(self._config)
        candidates = [
            r for r in self._scheduler.running if r.deterministic and r.lease.num_computed and r not in plan
        ]
        # Without anything that rests on a certificate, the verifier's own constancy is what is audited.
        candidates = [r for r in candidates if r.lease.proved < r.lease.num_computed] or candidates
        if candidates and not plan.full:
            request = candidates[self._rng.integers(len(candidates))]
            computed = request.lease.num_computed
            start = int(self._rng.integers(computed))
            first_row = max(start, request.prompt_len - 1)
            end = min(computed, start + plan.tokens_left, first_row + plan.rows_left)
            if end > start:
                plan.add(Span(request, start, end, min(first_row, end), audit=True))
                self._credit = min(self._credit - due, due)
        return plan if plan.chunks else None

    def before(self, chunk: Chunk) -> Replay:
        """To be called before the verifier step that holds the audited `chunk`."""
        slots = torch.from_numpy(
            slots_of(chunk.request, np.arange(chunk.start, chunk.end), self._config.page_size)
        )
        return Replay(chunk, slots, read_kv(self._cache, slots, self._config.page_size))

    def after(self, replay: Replay, sampled: Sampled, first: int) -> None:
        """Compare; rows of the chunk begin at `first`. On a difference, logs an error and takes back.

        Raises IntegrityError if what differs was the verifier graph's own work.
        """
        chunk = replay.chunk
        self._stats.audits += 1
        self._stats.audited_tokens += chunk.num_tokens
        found = self._first_difference(replay, sampled, first)
        if found is None:
            prove(chunk, chunk.num_rows)
            self._confirm_pages(chunk.request.lease)
            return
        position, origins = found
        shapes = {s for s in map(self._certificates.shape_of, origins) if s is not None}
        if not shapes:
            self._certificates.convict_verifier()
            raise IntegrityError(
                f"the verifier graph is not row independent: its own result at position {position} of "
                f"{chunk.request.id} has other bits when replayed, so nothing it commits is deterministic"
            )
        self._certificates.revoke(shapes)
        _log.error(
            "certificate of the fast graph at %s revoked: an audit of %s found other bits at position %d; "
            "unaudited results are taken back",
            *(named(shapes), chunk.request.id, position),
        )
        self.take_back()

    def _first_difference(self, replay: Replay, sampled: Sampled, first: int) -> tuple[int, set[int]] | None:
        """Position of the first KV entry or output that differs, and the origins that may have caused it."""
        chunk, request, size = replay.chunk, replay.chunk.request, self._config.page_size
        history = request.history
        same = self._ranks.agree(kv_rows_equal(replay.before, read_kv(self._cache, replay.slots, size)))
        differing = torch.nonzero(~same)
        found: tuple[int, set[int]] | None = None
        if len(differing):
            position = chunk.start + int(differing[0, 0])
            found = position, set(self._origins(request, position, position + 1))
        for j in range(chunk.num_rows):
            position = chunk.first_row + j
            if found is not None and found[0] <= position:
                break
            output = position - (request.prompt_len - 1)
            committed = history.tokens[position + 1], history.logprobs[output]
            replayed = sampled.tokens[first + j], sampled.logprobs[first + j]
            if row_problem(sampled, first + j) or replayed != committed:
                # Outputs survive a preemption, so the KV before the window may be newer than this one, and
                # wrong.
                context = self._origins(request, min(request.lease.proved, chunk.start), chunk.start)
                return position, {history.origins[output], *context}
        return found

    def _origins(self, request: Request, start: int, end: int) -> list[int]:
        positions, size = np.arange(start, end), self._config.page_size
        pages = request.lease.block_row[positions // size]
        found: list[int] = self._pool.origin[pages, positions % size].tolist()
        return found

    def _confirm_pages(self, lease: Lease) -> None:
        for page in lease.pages[: lease.proved // self._config.page_size]:
            self._pool.proved[page] = 1

    def take_back(self) -> None:
        """Return every deterministic request to what the verifier graph itself computed, and name those that
        ended on certificates alone."""
        self._stats.suspects += self._certified_finishes
        self._certified_finishes.clear()
        self._certificates.learned.clear()
        self._pool.drop_unproved()
        for request in (*self._scheduler.running, *self._scheduler.waiting):
            lease, unproved = request.lease, request.history.proved < request.num_outputs
            if request.deterministic and (unproved or lease.proved < lease.num_computed):
                self._stats.rollbacks += 1
                request.take_back_unproved()
                if request.state is State.RUNNING:
                    self._scheduler.preempt(request)
