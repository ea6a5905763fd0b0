"""Which rows run next. First come, first served; memory is taken back from the newest request first.

Each step runs at most one fast batch and one verifier batch. The fast batch holds a row for every request
that can decode, then prompt chunks that fill a bucket. A deterministic prompt goes there only if the bucket's
results commit; otherwise, like every window of proposals, it goes to the verifier.

Drafts turn a row that is to be committed into a window of rows, in the fast batch as in the verifier's. They
take rows and pages that are left when everything else has its place, and give the pages back in that step.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llm42c.runtime.block_pool import BlockPool
from llm42c.runtime.certificates import Certificates
from llm42c.runtime.config import WINDOW_ROWS, EngineConfig
from llm42c.runtime.packing import Chunk, Span
from llm42c.runtime.request import Lease, Proposal, Request, State
from llm42c.runtime.speculate import Speculator
from llm42c.runtime.stats import Stats

_log = logging.getLogger(__name__)

# Padding of up to this many tokens is cheaper than another pass over the weights.
PADDING_SLACK = 8


@dataclass(slots=True)
class FastPlan:
    chunks: list[Chunk]
    num_tokens: int  # bucket
    num_rows: int  # bucket
    commits: bool  # the bucket is certified: results of deterministic requests are final

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_tokens, self.num_rows


class Scheduler:
    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        certificates: Certificates,
        stats: Stats,
        speculator: Speculator,
    ) -> None:
        self._config = config
        self._pool = pool
        self._certificates = certificates
        self._stats = stats
        self._speculator = speculator
        self._buckets = config.token_buckets
        self.waiting: list[Request] = []  # both in order of arrival
        self.running: list[Request] = []
        self._deferred: list[Request] = []  # prompts that the verifier has to continue in this step
        self._windows: dict[int, int] = {}  # length of the drafts that the fast batch holds, by request

    # -- requests come and go --------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=_arrival)

    def withdraw(self, request: Request) -> None:
        """Take back an `add` that may have been broken off."""
        if request in self.waiting:
            self.waiting.remove(request)

    def remove(self, request: Request) -> None:
        """Forget a finished, failed or aborted request and free its pages."""
        (self.running if request.state is State.RUNNING else self.waiting).remove(request)
        self._free(request)
        request.state = State.FINISHED

    def clear(self) -> None:
        """Forget every request; their pages are the caller's to free."""
        self.waiting.clear()
        self.running.clear()
        self._deferred.clear()

    def preempt(self, request: Request) -> int:
        """Take a request's pages; it keeps what is committed. Returns how many proposals were lost."""
        self.running.remove(request)
        self._free(request)
        request.state = State.WAITING
        self.add(request)
        lost = len(request.proposal.tokens)
        request.proposal = Proposal()
        return lost

    def _free(self, request: Request) -> None:
        self._pool.release(request.lease.pages)
        request.lease = Lease(request.lease.block_row)

    def _admit(self) -> None:
        while len(self.running) < self._config.max_num_seqs:
            request = next((r for r in self.waiting if self._certificates.may_run(r.deterministic)), None)
            if request is None:
                return
            pages, length = self._match(request), len(request.history.tokens)
            new = self._pages_for(length) - len(pages)
            idle = sum(self._pool.is_idle(p) for p in pages)
            running = len(self.running)
            # A page for each running request, so that an admission does not cause a preemption at once.
            spare = running + self._certificates.reserve(running + 1)
            if self._pool.num_free - idle < new + spare:
                return
            self.waiting.remove(request)
            request.state = State.RUNNING
            bisect.insort(self.running, request, key=_arrival)
            lease = request.lease
            for i, page in enumerate(pages):
                self._pool.retain(page)
                lease.append(page)
                if self._pool.proved[page] and lease.proved == i * self._config.page_size:
                    lease.proved += self._config.page_size
            lease.shared = len(pages)
            lease.num_computed = len(pages) * self._config.page_size
            self._stats.prefix_hits += len(pages)
            self._stats.prefix_hit_tokens += lease.num_computed
            self._grow(lease, length)

    def _match(self, request: Request) -> list[int]:
        """Pages of the longest cached prefix that leaves the newest token to be computed."""
        pages: list[int] = []
        if self._config.prefix_cache:
            for i in range((len(request.history.tokens) - 1) // self._config.page_size):
                page = self._pool.lookup(self._key(request, i))
                if page is None:
                    break
                pages.append(page)
        return pages

    def share(self, request: Request) -> None:
        """Offer the request's full canonical pages to the prefix cache."""
        if not self._config.prefix_cache:
            return
        size, lease = self._config.page_size, request.lease
        while (lease.shared + 1) * size <= lease.num_computed:
            i = lease.shared
            self._pool.register(lease.pages[i], self._key(request, i), lease.proved >= (i + 1) * size)
            lease.shared += 1

    def _key(self, request: Request, i: int) -> bytes:
        """The key of full page `i`, each computed once in a request's life."""
        size, keys = self._config.page_size, request.history.page_keys
        while len(keys) <= i:
            start = len(keys) * size
            tokens = request.history.tokens[start : start + size]
            keys.append(self._pool.key(keys[-1] if keys else None, tokens))
        return keys[i]

    # -- memory ----------------------------------------------------------------------------------------------

    def _pages_for(self, num_positions: int) -> int:
        return -(-num_positions // self._config.page_size)

    def _grow(self, lease: Lease, num_positions: int) -> bool:
        """Add pages for `num_positions`; False (and what there is stays) when none is free."""
        while len(lease.pages) < self._pages_for(num_positions):
            page = self._pool.allocate()
            if page is None:
                return False
            lease.append(page)
        return True

    def _secure(self, request: Request, num_positions: int) -> bool:
        """Like `_grow`, preempting newer requests; False if the request itself had to go."""
        while not self._grow(request.lease, num_positions):
            victim = self.running[-1]
            self._preempt(victim, request.id)
            if victim is request:
                return False
        return True

    def trim(self, lease: Lease, num_positions: int) -> None:
        """Give back the pages beyond `num_positions`; drafts that were not accepted had them."""
        used = self._pages_for(num_positions)
        if len(lease.pages) > used:
            self._pool.release(lease.pages[used:])
            del lease.pages[used:]

    def _grow_for_drafts(self, lease: Lease, num_positions: int) -> int:
        """Positions that pages are there for: up to `num_positions`, as long as nobody has to give any."""
        while len(lease.pages) < self._pages_for(num_positions) and self._pool.num_spare:
            self._grow(lease, len(lease.pages) * self._config.page_size + 1)
        return len(lease.pages) * self._config.page_size

    def _hold(self, request: Request, num_positions: int) -> int:
        """Pages for what a draft model reads and writes of a request, as `_grow_for_drafts`."""
        return self._grow_for_drafts(request.lease, num_positions)

    def make_room(self) -> None:
        """For a probe that has waited for pages: preempt the newest requests until there are as many."""
        while self.running and self._pool.num_free < self._certificates.reserve(len(self.running)):
            self._preempt(self.running[-1], "a probe")

    def _preempt(self, victim: Request, cause: str) -> None:
        self._stats.preemptions += 1
        _log.info("%s preempted for %s: no KV page is free", victim.id, cause)
        self._stats.recomputed_tokens += self.preempt(victim)

    # -- the fast batch --------------------------------------------------------------------------------------

    def plan_fast(self) -> FastPlan | None:
        self._admit()
        self._deferred, self._windows = [], {}
        decodes, prompts = self._candidates()
        if any(r.deterministic for r in prompts):
            plan = self._committing_plan(decodes, prompts)
            if plan is not None:
                return self._with_drafts(plan)
            self._deferred = [r for r in prompts if r.deterministic]
            prompts = [r for r in prompts if not r.deterministic]
        if not decodes and not prompts:
            return None
        if any(r.deterministic for r in decodes):
            plan = self._committing_plan(decodes, prompts)
            if plan is not None:
                return self._with_drafts(plan)
        return self._build(decodes, prompts, self._fill(len(decodes), _remaining(prompts)))

    def _candidates(self) -> tuple[list[Request], list[Request]]:
        """Requests that can take one token, with memory for it, and requests with a prompt to compute."""
        decodes: list[Request] = []
        prompts: list[Request] = []
        for request in list(self.running):
            if request.state is not State.RUNNING:
                continue  # preempted for an older request, a moment ago
            if request.prefilling:
                prompts.append(request)
            elif _awaits_verifier(request.proposal, self._config.pending_limit):
                continue
            elif self._secure(request, request.num_tokens):
                decodes.append(request)
        return decodes, prompts

    def _fill(self, num_decodes: int, num_prompt_tokens: int) -> int:
        """The bucket to run: the next larger one if the padding is small, else a smaller one, filled."""
        want = min(num_decodes + num_prompt_tokens, self._buckets[-1])
        i = bisect.bisect_left(self._buckets, want)
        if i > 0 and self._buckets[i] - want > PADDING_SLACK and self._buckets[i - 1] > num_decodes:
            return self._buckets[i - 1]
        return self._buckets[i]

    def _committing_plan(self, decodes: list[Request], prompts: list[Request]) -> FastPlan | None:
        """A plan whose bucket is certified, if one of a sensible size is."""
        num_decodes, num_prompt = len(decodes), _remaining(prompts)
        if not self._certificates.enabled:
            return None
        # A prompt that would trickle in is faster through the verifier.
        least = num_decodes + min(num_prompt, self._config.verify_tokens // 2)
        want = num_decodes + num_prompt
        usable = [b for b in self._buckets if least <= b <= max(2, 2 * want)]
        usable.sort(key=lambda b: (b > want, abs(b - want)))
        asked = False
        for bucket in (self._fill(num_decodes, num_prompt), *usable):
            plan = self._build(decodes, prompts, bucket)
            if plan.commits:
                return plan
            asked = asked or self._certificates.want(plan.shape)
        return None

    def _build(self, decodes: list[Request], prompts: list[Request], bucket: int) -> FastPlan:
        chunks = []
        for request in decodes:
            end = request.num_tokens
            chunks.append(Span(request, end - 1, end, end - 1))
        room, rows = bucket - len(decodes), len(decodes)
        for request in prompts:
            if room == 0:
                break
            length, start = len(request.history.tokens), request.lease.num_computed
            end = min(length, start + room)
            first_row = end - 1 if end == length else end
            chunks.append(Span(request, start, end, first_row))
            room -= end - start
            rows += end - first_row
        num_rows = self._config.row_bucket(bucket, rows)
        return FastPlan(chunks, bucket, num_rows, self._certificates.commits((bucket, num_rows)))

    # -- drafts ----------------------------------------------------------------------------------------------

    def _with_drafts(self, plan: FastPlan) -> FastPlan:
        """A committing `plan` with windows in place of single rows, in a larger bucket if one commits too."""
        open_spans = [c for c in plan.chunks if _takes_drafts(c) and not c.request.proposal.tokens]
        tokens = sum(c.num_tokens for c in plan.chunks)
        rows = sum(c.num_rows for c in plan.chunks)
        sizes = self._draft_sizes(plan.num_tokens)
        # Guesses ask for no more rows than a full batch of decodes has.
        most = self._config.row_bucket(self._buckets[-1], self._config.max_num_seqs) - rows

        def guess(requests: list[Request], given: int) -> list[list[int]]:
            larger = [s for s in sizes if s >= tokens + given] or sizes[-1:]
            return self._speculator.choose(requests, tokens + given, larger, most - given, self._hold)

        drafts = self._drafts(open_spans, sizes[-1] - tokens, guess)
        wanted = sum(map(len, drafts))
        if not wanted:
            return plan
        best = next((s for s in sizes if s >= tokens + wanted), sizes[-1])
        for bucket in (s for s in reversed(sizes) if s <= best):
            left = max(0, min(bucket - tokens, wanted, self._config.window_rows(bucket) - rows))
            num_rows = self._config.row_bucket(bucket, rows + left)
            if self._certificates.commits((bucket, num_rows)):
                for span, draft in zip(open_spans, drafts, strict=True):
                    left -= self._extend(span, draft[:left])
                return FastPlan(plan.chunks, bucket, num_rows, commits=True)
            if bucket == best:
                self._certificates.want((bucket, num_rows))
        return plan

    def _draft_sizes(self, least: int) -> list[int]:
        """The bucket `least`, and those above it that may be filled by drafts."""
        return [least, *(b for b in self._buckets if least < b <= WINDOW_ROWS and b & (b - 1) == 0)]

    def _drafts(
        self, spans: list[Chunk], room: int, guess: Callable[[list[Request], int], list[list[int]]]
    ) -> list[list[int]]:
        """A draft, which may be empty, for each of `spans`; `room` tokens together.

        First those that came with their requests; `guess(requests, given)` is asked for the others, when so
        many tokens are given away.
        """
        drafts, given = [], 0
        for span in spans:
            drafts.append(span.request.allowed(span.request.given_draft(room - given)))
            given += len(drafts[-1])
        others = [i for i, draft in enumerate(drafts) if not draft]
        for i, draft in zip(others, guess([spans[i].request for i in others], given), strict=True):
            drafts[i] = spans[i].request.allowed(draft)
        return drafts

    def _extend(self, chunk: Chunk, draft: list[int]) -> int:
        """Put `draft` behind a chunk, as far as pages are there; returns by how many positions it grew."""
        if not draft:
            return 0
        request = chunk.request
        held = self._grow_for_drafts(request.lease, chunk.end + len(draft))
        added = request.extend_proposal(draft[: held - chunk.end])
        chunk.end += added
        self._windows[id(request)] = added
        return added

    # -- the verifier batch ----------------------------------------------------------------------------------

    def plan_verify(self) -> VerifyPlan | None:
        """Windows that are ready, prompts that the fast step left, then windows that merely fit; or None."""
        windows = [r for r in self.running if self._ready(r)]
        prompts = [r for r in self._deferred if r.state is State.RUNNING]
        if not windows and not prompts:
            return None
        windows.sort(key=lambda r: (not r.proposal.ended, -len(r.proposal.tokens)))
        plan = VerifyPlan(self._config)
        # Neither kind may starve the other.
        reserved = min(_remaining(prompts), self._config.verify_tokens // 2)
        for request in windows:
            plan.add(self._continuation(request, plan, reserved))
        for request in prompts:
            plan.add(self._continuation(request, plan))
        for request in (*windows, *self._speculating()):
            if request not in plan:
                plan.add(self._continuation(request, plan))
        return plan

    def fill_with_drafts(self, plan: VerifyPlan) -> None:
        """Give what is left of the verifier's shape to drafts behind the chunks that are there."""
        open_spans = [c for c in plan.chunks if _takes_drafts(c)]
        room = min(plan.tokens_left, plan.rows_left)
        drafts = self._drafts(
            open_spans, room, lambda r, given: self._speculator.fill(r, room - given, self._hold)
        )
        for span, draft in zip(open_spans, drafts, strict=True):
            plan.grown(self._extend(span, draft))

    def _ready(self, request: Request) -> bool:
        if not request.deterministic or request.prefilling:
            return False
        proposal = request.proposal
        if proposal.drain or _awaits_verifier(proposal, self._config.verify_window):
            return True
        # A draft so long that the fast batch took little of it fills a step of the verifier too.
        enough = self._config.verify_tokens
        taken = self._windows.get(id(request), -1)
        return taken < enough // 2 and len(request.given_draft(enough)) >= (enough if taken >= 0 else 1)

    def _speculating(self) -> Iterator[Request]:
        return (r for r in self.running if r.proposal.tokens)

    def _continuation(self, request: Request, plan: VerifyPlan, reserved: int = 0) -> Chunk | None:
        """The next canonical positions of a request that fit into the plan."""
        newest, lease = len(request.history.tokens) - 1, request.lease
        # The newest proposal is an input too, for the verifier's own next token, unless it ends the request.
        total = request.num_tokens - request.proposal.ended
        self._grow(lease, total)
        total = min(total, len(lease.pages) * self._config.page_size)
        end = min(total, lease.num_computed + plan.tokens_left - reserved, newest + plan.rows_left)
        if end <= lease.num_computed:
            return None
        return Span(request, lease.num_computed, end, min(newest, end))


class VerifyPlan:
    """Chunks of one verifier step, within its fixed shape."""

    def __init__(self, config: EngineConfig) -> None:
        self.chunks: list[Chunk] = []
        self.tokens_left = config.verify_tokens
        self.rows_left = config.rows
        self._seqs_left = config.verify_seqs
        self._members: set[int] = set()

    def add(self, chunk: Chunk | None) -> None:
        if chunk is None or self._seqs_left == 0:
            return
        self.chunks.append(chunk)
        self.tokens_left -= chunk.num_tokens
        self.rows_left -= chunk.num_rows
        self._seqs_left -= 1
        self._members.add(id(chunk.request))

    def grown(self, count: int) -> None:
        """A chunk that is here has grown by `count` positions with a row each."""
        self.tokens_left -= count
        self.rows_left -= count

    @property
    def full(self) -> bool:
        return self._seqs_left == 0 or self.tokens_left == 0

    def __contains__(self, request: Request) -> bool:
        return id(request) in self._members


def _arrival(request: Request) -> int:
    return request.arrival


def _remaining(prompts: list[Request]) -> int:
    """Prompt tokens still to be computed."""
    return sum(len(r.history.tokens) - r.lease.num_computed for r in prompts)


def _takes_drafts(chunk: Chunk) -> bool:
    """Whether a chunk's last row is for the token behind everything that is known of its request."""
    request, proposal = chunk.request, chunk.request.proposal
    settled = proposal.ended or proposal.blocked or chunk.audit
    return request.deterministic and chunk.end == request.num_tokens and not settled


def _awaits_verifier(proposal: Proposal, enough: int) -> bool:
    return proposal.ended or proposal.blocked or len(proposal.tokens) >= enough
