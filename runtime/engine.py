"""The engine: schedule → pack → run → sample → (commit | propose | verify) → deliver.

`step` is the whole of it; everything else here is a request's way in and out.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from llm42c.capture.packed import PackedModel
from llm42c.errors import ConfigError, ContractMismatchError, IntegrityError, RequestError
from llm42c.parallel.ranks import ALONE, Ranks
from llm42c.runtime.accept import VERIFIER, Verdict, accept, row_problem
from llm42c.runtime.audit import Auditor
from llm42c.runtime.block_pool import BlockPool, kv_digest
from llm42c.runtime.certificates import Certificates
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.contract import Contract, engine_contract
from llm42c.runtime.door import Door
from llm42c.runtime.draft_models import Build, DraftModels
from llm42c.runtime.drafters import AS_ENGINE, Speculate
from llm42c.runtime.graphs import GraphDevice, GraphedModel
from llm42c.runtime.intake import Limits, check_id
from llm42c.runtime.outputs import RequestOutput, news_of
from llm42c.runtime.packing import Chunk, Packer, slots_of
from llm42c.runtime.probe import Probe
from llm42c.runtime.processors import Decode
from llm42c.runtime.receipt import Receipt, ReplayResult, compare, contract_result
from llm42c.runtime.request import Proposal, Request, State
from llm42c.runtime.resumption import RequestState
from llm42c.runtime.sampling import (
    RowSampler,
    Sampled,
    Sampler,
    SamplingParams,
    operator_sampler,
    shown,
)
from llm42c.runtime.scheduler import FastPlan, Scheduler
from llm42c.runtime.scoring import Scored, scored, scoring_params
from llm42c.runtime.speculate import Speculator
from llm42c.runtime.stats import Load, Stats
from llm42c.runtime.structured import Grammars

_log = logging.getLogger(__name__)

SPOT_SHARE = 0.02  # of the engine's time that spot checks may take
PROBE_PATIENCE = 16  # steps that a probe waits for pages before it takes them from the newest requests


class Engine:
    """Continuous batching of deterministic and ordinary requests over one paged KV cache.

    `fast` runs at bucketed shapes, `verifier` always at (verify_tokens, verify_seqs, verify_rows); both read
    and write the same cache. `sampler` defaults to the llm42 operators; `decode` turns token ids into text
    and is needed for stop strings, `grammars` for structured output, `draft_models`, which compiles one, for
    drafts by a model; `contract` defaults to what can be known
    from the arguments. Not thread-safe. With `ranks`, every rank makes the same engine and calls it in the
    same way. With `graphs`, steps are recorded once for each shape and replayed.

    Raises ConfigError when the configuration cannot work, and IntegrityError when `certify="startup"` finds
    that the verifier graph is not row independent, or the certificate store says that it was found before.
    """

    def __init__(
        self,
        fast: PackedModel,
        verifier: PackedModel,
        config: EngineConfig,
        *,
        sampler: Sampler | None = None,
        decode: Decode | None = None,
        contract: Contract | None = None,
        ranks: Ranks = ALONE,
        graphs: GraphDevice | None = None,
        grammars: Grammars | None = None,
        draft_models: Build | None = None,
    ) -> None:
        if (fast.vocab_size, fast.dtype) != (verifier.vocab_size, verifier.dtype):
            raise ConfigError("the fast and the verifier graph have different vocabularies or dtypes")
        self.config = config
        self.contract = contract or engine_contract(verifier, config, tp_size=ranks.size)
        self._ranks = ranks
        ranks.require_same("the contract", self.contract.to_json())
        context = min(config.max_model_len or 1 << 62, verifier.max_position_embeddings)
        num_pages = config.num_pages or config.kv_cache_bytes // verifier.kv_bytes_per_page(config.page_size)
        if num_pages < 1:
            raise ConfigError(f"kv_cache_bytes ({config.kv_cache_bytes}) does not hold one page")
        self.limits = Limits(verifier.vocab_size, context, num_pages, config.page_size, decode is not None)
        self._cache = verifier.new_kv_cache(num_pages, config.page_size)
        self._decode, self.grammars = decode, grammars
        self._stats = Stats()
        self._fast, self._verifier = fast, verifier  # what steps run; probes call the models themselves
        if graphs is not None:
            rows = max((r for t, r in config.shapes() if t <= config.cuda_graph_tokens), default=0)
            self._fast, self._verifier = (
                GraphedModel(model, self._cache, graphs, self._stats, config.cuda_graph_tokens, most)
                for model, most in ((fast, rows), (verifier, config.rows))
            )
        self._pool = BlockPool(num_pages, config.page_size, self.contract.hash.encode())
        probe = Probe(fast, verifier, config, context, self._cache, self._pool, ranks)
        self.certificates = Certificates(config, self.contract, probe, self._stats, ranks)
        self._max_pages = -(-context // config.page_size)
        sampler = sampler or operator_sampler(self._cache.k[0].device)
        self._draft_models = DraftModels(
            draft_models,
            verifier,
            self._cache,
            num_pages,
            self._max_pages,
            config,
            sampler,
            self._stats,
            one_rank=ranks.size == 1,
        )
        self._speculator = Speculator(verifier.vocab_size, self._stats, ranks, self._draft_models)
        self._scheduler = Scheduler(config, self._pool, self.certificates, self._stats, self._speculator)
        self._auditor = Auditor(
            config, self._cache, self._pool, self._scheduler, self.certificates, self._stats, ranks
        )
        self._door = Door(self.limits, config, decode, grammars, ranks, self._draft_models)
        top, size = config.token_buckets[-1], config.page_size
        self._fast_packer = Packer(top, config.max_num_seqs, top, self._max_pages, size)
        self._verify_packer = Packer(
            config.verify_tokens, config.verify_seqs, config.rows, self._max_pages, size
        )
        # One for each kind of step, because each remembers the parameters of its last batch.
        self._sample_fast, self._sample_verify = RowSampler(sampler), RowSampler(sampler)
        self._requests: dict[str, Request] = {}
        self._touched: dict[str, Request] = {}  # with something new to deliver
        self._held: list[RequestOutput] = []  # for the next `step`
        self._arrivals = itertools.count()
        self._longest_spot = 0.0  # seconds of a forward of spot checks
        self._closed = False
        _log.info(
            "engine built: contract %s, %d KV pages of %d tokens, context %d, %d fast shapes",
            self.contract.hash,
            num_pages,
            config.page_size,
            context,
            len(config.shapes()),
        )
        if config.certify == "startup":
            self.certify()

    # -- requests --------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        deterministic: bool = True,
        request_id: str | None = None,
        contract: str | Contract | None = None,
        stream: bool = True,
        draft: Sequence[int] | None = None,
        forced: bool = False,
        speculate: Speculate = AS_ENGINE,
        receipt: bool = False,
    ) -> str:
        """Queue a request; returns its id. Raises RequestError (ContractMismatchError) and changes nothing.

        `draft`: tokens that the output probably begins with. They change no bit of it; as far as they are
        right, many are committed in one pass. What lies behind the first wrong one is not looked at.
        With `forced` the output is the draft, whatever the model prefers, for the sake of its log-probs.
        `speculate`: who drafts for this request, as in EngineConfig; by default as the engine says. With
        `receipt` the finished output has one.
        With `stream=False` only the finished output is delivered, so that even a revoked certificate can be
        repaired before the user sees a token.
        """
        self._refuse_if_closed()
        if contract is not None:
            self._require(contract)
        if request_id is None:
            arrival, request_id = self._next_id()
        else:
            arrival, request_id = next(self._arrivals), check_id(request_id)
        if request_id in self._requests:
            raise RequestError(f"request id {shown(request_id)} is in use")
        request = self._door.request(
            request_id,
            arrival,
            prompt_ids,
            params,
            deterministic=deterministic,
            stream=stream,
            draft=draft,
            forced=forced,
            speculate=speculate,
            receipt=receipt,
        )
        try:
            self._requests[request_id] = request
            self._scheduler.add(request)
        except BaseException:  # Ctrl-C in between: nothing changes
            self._requests.pop(request_id, None)
            self._scheduler.withdraw(request)
            raise
        return request_id

    def _next_id(self) -> tuple[int, str]:
        """An arrival number, and an id after it that no request has taken for itself."""
        for arrival in self._arrivals:
            if f"request-{arrival}" not in self._requests:
                break
        return arrival, f"request-{arrival}"

    def _require(self, contract: str | Contract) -> None:
        if not isinstance(contract, Contract) and not (isinstance(contract, str) and contract.isalnum()):
            raise RequestError(f"contract must be a contract or its hash, not {shown(contract)}")
        self.contract.require(contract)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed")

    def close(self) -> None:
        """Abort every request, and refuse any further one with a RequestError. Its memory goes with the
        object."""
        self._closed = True
        self._drop_everything()
        self._held = []

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its pages; nothing more is delivered for it. False if it is not running.

        Raises RequestError for what cannot be a request's id.
        """
        if not isinstance(request_id, str):
            raise RequestError(f"a request id is a string, not {shown(request_id)}")
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        self._scheduler.remove(request)
        self._stats.aborted += 1
        _log.debug("%s aborted after %d tokens", request_id, request.num_outputs)
        return True

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def export(self, request_id: str) -> RequestState:
        """A running deterministic request as a value that `resume` of another engine takes; it goes on here.

        Raises RequestError for an ordinary one, and for one with logits processors.
        """
        return RequestState.of(self.contract, self._running(request_id))

    def resume(
        self,
        state: RequestState,
        *,
        request_id: str | None = None,
        stream: bool = True,
        speculate: Speculate = AS_ENGINE,
        receipt: bool = False,
    ) -> str:
        """Continue a request of another engine; returns its id. What comes is new to the state, and ends in
        the whole output. Raises as `submit` does, ContractMismatchError first.

        A state that is not what its contract gives ends in an error of that request.
        """
        taken = self.submit(
            state.prompt,
            state.params,
            request_id=request_id,
            contract=state.contract,
            stream=stream,
            draft=state.tokens,
            speculate=speculate,
            receipt=receipt,
        )
        state.hand_over(self._requests[taken], self._decode)
        return taken

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        deterministic: bool = True,
    ) -> list[RequestOutput]:
        """Run `prompts` to their ends; returns finished outputs in order. Raises as `submit` does.

        Other requests go on meanwhile; what they have to say is returned by the next `step`.
        """
        if not isinstance(prompts, Sequence | np.ndarray | Tensor):
            raise RequestError(f"prompts must be a sequence of prompts, not {shown(prompts)}")
        if not isinstance(params, Sequence | SamplingParams | None):
            raise RequestError(f"params must be a SamplingParams or a list of them, not {shown(params)}")
        each = (
            [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        )
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        return self._complete(
            lambda: [
                self.submit(prompt, p, deterministic=deterministic, stream=False)
                for prompt, p in zip(prompts, each, strict=True)
            ]
        )

    def score(self, prompt: Sequence[int], completion: Sequence[int]) -> Scored:
        """Log-probs of given tokens, with the bits that generating them would give. Raises RequestError."""
        return self.score_batch([(prompt, completion)])[0]

    def score_batch(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """`score` of each (prompt, completion), together. Raises RequestError, and then scores none."""
        outputs = self._complete(
            lambda: [
                self.submit(prompt, scoring_params(given), stream=False, draft=given, forced=True)
                for prompt, given in pairs
            ]
        )
        return [scored(output) for output in outputs]

    def replay(self, receipt: Receipt) -> ReplayResult:
        """Do again what `receipt` says was done, its tokens as one draft, and compare. Raises RequestError
        where this engine cannot serve the request."""
        elsewhere = contract_result(receipt, self.contract)
        if elsewhere is not None:
            return elsewhere
        try:
            (output,) = self._complete(
                lambda: [self.submit(receipt.prompt, receipt.params, stream=False, draft=receipt.tokens)]
            )
        except ContractMismatchError as error:  # of who computes masks
            return ReplayResult("another contract", f"another contract: {error}", fields=(str(error),))
        return compare(receipt, output)

    def _complete(self, submit: Callable[[], list[str]]) -> list[RequestOutput]:
        """Run what `submit` submits to its end; other requests go on meanwhile."""
        self._refuse_if_closed()
        before = next(self._arrivals)
        others: list[RequestOutput] = []
        try:
            ids = submit()
            done: dict[str, RequestOutput | None] = dict.fromkeys(ids)
            while None in done.values():
                for output in self.step():
                    if output.request_id in done:
                        done[output.request_id] = output
                    else:
                        others.append(output)
        except BaseException:
            for request in [r for r in self._requests.values() if r.arrival > before]:
                self.abort(request.id)
            raise
        finally:
            self._held = others + self._held
        return [output for output in done.values() if output is not None]

    def certify(self, full: bool = False) -> None:
        """Check the verifier graph and settle the state of every shape now, instead of along the way; with
        `full` by comparing bits even where they are the same by construction."""
        start = time.perf_counter()
        self.certificates.settle_all(full=full)
        self._stats.seconds_probe += time.perf_counter() - start
        self._stats.seconds_total += time.perf_counter() - start

    def stats(self) -> Stats:
        return self._stats

    def load(self) -> Load:
        scheduler, pages = self._scheduler, self.limits.num_pages
        return Load(len(scheduler.running), len(scheduler.waiting), pages, pages - self._pool.num_free)

    def kv_digest(self, request_id: str, num_positions: int | None = None) -> str:
        """Digest of the KV bits of a running request's leading computed positions. Raises RequestError."""
        request = self._running(request_id)
        count = request.lease.num_computed
        if num_positions is not None:
            count = min(num_positions, count)
        return kv_digest(self._cache, self._slots(request, 0, count), self.config.page_size)

    def _running(self, request_id: str) -> Request:
        if not isinstance(request_id, str) or request_id not in self._requests:
            raise RequestError(f"no request {shown(request_id)} is running")
        return self._requests[request_id]

    # -- one step --------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run at most one fast and one verifier batch; returns what is new, request by request.

        A step that is broken off (KeyboardInterrupt, no memory left) drops every request: nothing builds on
        what it left half done, and the engine can be used again. A probe that is broken off drops none.
        Raises IntegrityError, with every request as it was, when the verifier graph is found not to be row
        independent.
        """
        if self._closed:
            return []  # nor is a shape probed that was still waiting
        try:
            return self._step()
        except IntegrityError:
            raise
        except BaseException as error:
            count = len(self._requests)
            _log.info("a step was broken off (%s): %d requests dropped", type(error).__name__, count)
            self._drop_everything()
            raise

    def _drop_everything(self) -> None:
        self._stats.aborted += len(self._requests)
        self._requests.clear()
        self._touched.clear()
        self._scheduler.clear()
        self._pool.clear()

    def _step(self) -> list[RequestOutput]:
        start = time.perf_counter()
        self._stats.steps += 1
        fast = self._scheduler.plan_fast()
        if fast is not None:
            self._run_fast(fast)
        verify = self._auditor.extend(self._scheduler.plan_verify())
        if verify is not None:
            self._scheduler.fill_with_drafts(verify)
            self._run_verifier(verify.chunks)
        probing = time.perf_counter()
        self._probe()
        self._stats.seconds_probe += time.perf_counter() - probing
        outputs = self._held + self._deliver()
        self._held = []
        self._stats.seconds_total += time.perf_counter() - start
        return outputs

    def _probe(self) -> None:
        """One forward of probing. Requests that may not start without its result, and now will not, fail."""
        self.certificates.notice()
        if self.certificates.waited >= PROBE_PATIENCE:
            self._scheduler.make_room()
        start, done = time.perf_counter(), self._stats.spot_checks
        ran = self.certificates.advance(self._may_spot_check())
        if ran and (self.certificates.spot_checking or done < self._stats.spot_checks):
            spent = time.perf_counter() - start
            self._stats.seconds_spot += spent
            self._longest_spot = max(self._longest_spot, spent)
        if self.certificates.learned:
            self._auditor.take_back()
        error, self.certificates.check_error = self.certificates.check_error, None
        if error is not None:
            for request in [r for r in self._scheduler.waiting if r.deterministic]:
                request.fail(f"the verifier graph could not be checked: {type(error).__name__}: {error}")
                self._touch(request)

    def _may_spot_check(self) -> bool:
        """Whether the next forward of a spot check is within its share of the engine's time."""
        stats = self._stats
        forward = max(self._longest_spot, stats.seconds_total / stats.steps)
        return stats.seconds_spot + forward < SPOT_SHARE * stats.seconds_total

    def _run_fast(self, plan: FastPlan) -> None:
        stats = self._stats
        inputs = self._fast_packer.pack(plan.chunks, plan.num_tokens, plan.num_rows)
        start = time.perf_counter()
        logits = self._fast.forward(inputs, self._cache)
        middle = time.perf_counter()
        sampled = self._sample_fast(logits, plan.chunks)
        stats.seconds_fast += middle - start
        stats.seconds_sample += time.perf_counter() - middle
        seconds = time.perf_counter() - start
        stats.fast_steps += 1
        row = tokens = committed = 0
        origin = self.certificates.origin_id(plan.shape) if plan.commits else VERIFIER
        for chunk in plan.chunks:
            request = chunk.request
            if not request.deterministic:
                committed += (new := self._accept(chunk, sampled, row, origin).committed)
                stats.ordinary_tokens += new
            elif plan.commits and len(request.proposal.tokens) == request.proposal.drafted:
                committed += (new := self._accept(chunk, sampled, row, origin).committed)
                stats.certified_tokens += new
            else:
                self._propose(request, sampled, row, plan.commits)
            row += chunk.num_rows
            tokens += chunk.num_tokens
        stats.fast_tokens += tokens
        stats.fast_padding += plan.num_tokens - tokens
        if plan.commits and row == tokens:  # decodes, and nothing of a prompt
            self._speculator.took(plan.num_tokens, len(plan.chunks), row, seconds, committed)

    def _propose(self, request: Request, sampled: Sampled, row: int, certified: bool) -> None:
        request.proposal.drain = certified
        if row_problem(sampled, row) is not None:
            # Perhaps only because an earlier proposal is wrong: the verifier decides.
            request.proposal.blocked = True
        else:
            self._stats.speculated_tokens += 1
            request.propose(sampled.tokens[row])

    def _run_verifier(self, chunks: list[Chunk]) -> None:
        stats, config = self._stats, self.config
        inputs = self._verify_packer.pack(chunks, config.verify_tokens, config.rows)
        replays = [self._auditor.before(c) for c in chunks if c.audit]
        start = time.perf_counter()
        logits = self._verifier.forward(inputs, self._cache)
        middle = time.perf_counter()
        sampled = self._sample_verify(logits, chunks)
        stats.seconds_verify += middle - start
        stats.seconds_sample += time.perf_counter() - middle
        stats.verifier_steps += 1
        tokens = sum(c.num_tokens for c in chunks)
        stats.verifier_tokens += tokens
        stats.verifier_padding += config.verify_tokens - tokens
        starts = itertools.accumulate((c.num_rows for c in chunks), initial=0)
        first = {id(c): row for c, row in zip(chunks, starts, strict=False)}
        # Audits first: a revocation takes back the ground that other chunks of this step stood on.
        for replay in replays:
            self._auditor.after(replay, sampled, first[id(replay.chunk)])
        for chunk in chunks:
            if not chunk.audit and chunk.request.state is State.RUNNING:
                verdict = self._accept(chunk, sampled, first[id(chunk)], VERIFIER)
                stats.verified_tokens += verdict.committed
                stats.rollbacks += verdict.rolled_back
                stats.recomputed_tokens += verdict.dropped

    def _accept(self, chunk: Chunk, sampled: Sampled, first: int, origin: int) -> Verdict:
        drafted = chunk.request.proposal.drafted
        verdict = accept(chunk, sampled, first, origin)
        if chunk.request.deterministic:
            self._auditor.wrote(chunk, origin)
            self._scheduler.share(chunk.request)
            self._stats.drafted_tokens += drafted
            self._stats.accepted_drafts += verdict.drafts_accepted
            self._scheduler.trim(chunk.request.lease, chunk.request.num_tokens)
        if verdict.committed or verdict.finished:
            self._touch(chunk.request)
        return verdict

    def _touch(self, request: Request) -> None:
        """The request has news; if it ended, it leaves."""
        self._touched[request.id] = request
        if request.finish_reason is None:
            return
        self._scheduler.remove(request)
        request.proposal = Proposal()
        request.close_text(self._decode)
        if request.finish_reason == "error":
            self._stats.failed += 1
        else:
            self._stats.finished += 1
        self._auditor.finished(request)

    def _deliver(self) -> list[RequestOutput]:
        outputs = []
        for request in self._touched.values():
            finished = request.finish_reason is not None
            if finished:
                del self._requests[request.id]
            elif not request.stream or request.delivery.outputs >= request.num_outputs:
                continue
            output = news_of(request, finished)
            if finished and request.wants_receipt and request.error is None:
                output.receipt = Receipt.of(self.contract, request)
            outputs.append(output)
        self._touched.clear()
        return outputs

    def _slots(self, request: Request, start: int, end: int) -> Tensor:
        return torch.from_numpy(slots_of(request, np.arange(start, end), self.config.page_size))
