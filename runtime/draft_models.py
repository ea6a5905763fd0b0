"""Models that draft for an engine: its own one with quantised weights, or a smaller one of its vocabulary.

They run between the engine's steps, all requests in one batch, a token a pass. A request's own parameters
and noise draw their tokens, so that a sampled output is guessed as well as a greedy one. What they compute
decides no bit: their tokens are drafts.

The engine's own model reads the keys and values that the engine has computed, and writes those of its guesses
behind them, at positions that hold nothing valid and that the step which checks the guesses writes anew. So
it needs no memory for them and reads no prompt. Another model has a cache of its own; it is rolled back by
forgetting positions, and reads what was committed meanwhile in its next pass.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from llm42c.capture.packed import KVCache, PackedModel
from llm42c.errors import ConfigError
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.drafters import ModelSpec, SelfDraft
from llm42c.runtime.packing import Packer, Span
from llm42c.runtime.request import Lease, State
from llm42c.runtime.sampling import RowSampler, Sampler
from llm42c.runtime.stats import Stats
from llm42c.runtime.step_times import StepTimes

if TYPE_CHECKING:
    from llm42c.runtime.request import Request

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltDraft:
    """A model that may draft."""

    model: PackedModel
    weight_bytes: int = 0


Build = Callable[[ModelSpec], BuiltDraft]
Hold = Callable[["Request", int], int]  # get pages for so many positions of a request; how many there are
GoOn = Callable[[int, float], bool]  # whether to guess on behind a token of that request and probability
BUCKETS = 10  # of probabilities, for which a model's guesses are counted apart


class Reader:
    """One request as a draft model reads it: what is known of it, and the guesses behind."""

    processed, grammar, forced = False, None, None  # guesses are drawn from the logits as they are

    def __init__(self, request: Request) -> None:
        self.params, self.seed = request.params, request.seed
        self.lease = request.lease
        self.known = 0  # tokens of the request when it was last read
        self.guess: list[int] = []
        self.computed = 0  # leading positions whose keys and values the model has
        self._request = request

    @property
    def length(self) -> int:
        return self.known + len(self.guess)

    def token_slice(self, start: int, end: int) -> list[int]:
        """Tokens of positions [start, end)."""
        of_request = self._request.token_slice(start, min(end, self.known)) if start < self.known else []
        return of_request + self.guess[max(0, start - self.known) : max(0, end - self.known)]

    def next_span(self) -> Span[Reader]:
        """What the model has not read, for logits of the token behind it."""
        return Span(self, self.computed, self.length, self.length - 1)

    def catch_up(self) -> None:
        """Look what became of the last guess: positions behind the first wrong token are forgotten."""
        now = self._request.num_tokens
        right = self.known
        if now >= self.known:
            said = self._request.token_slice(self.known, now)
            for token, guessed in zip(said, self.guess, strict=False):
                if token != guessed:
                    break
                right += 1
        self.computed = min(self.computed, right, now - 1)
        self.known, self.guess = now, []


class Store(Protocol):
    """Where a draft model keeps keys and values."""

    cache: KVCache
    nbytes: int  # of its own

    def open(self, reader: Reader, request: Request, count: int, hold: Hold) -> int:
        """Bring the reader up to date; how many tokens there is room to guess, up to `count`."""
        ...


class EngineCache:
    """The engine's own cache, in pages of the request itself."""

    nbytes = 0

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def open(self, reader: Reader, request: Request, count: int, hold: Hold) -> int:
        if request.prefilling:
            return 0
        reader.lease = request.lease
        reader.known, reader.guess = request.num_tokens, []
        # The newest token has no keys and values yet; before it, all are the engine's.
        reader.computed = reader.known - 1
        return min(count, hold(request, reader.computed + count) - reader.computed)


class OwnCache:
    """A cache of the model's own, with as many pages as the engine's; requests that have ended give theirs
    back when others need them."""

    def __init__(self, model: PackedModel, num_pages: int, page_size: int, max_pages: int) -> None:
        self.cache = model.new_kv_cache(num_pages, page_size)
        self.nbytes = num_pages * model.kv_bytes_per_page(page_size)
        self._most = model.max_position_embeddings
        self._size, self._max_pages = page_size, max_pages
        self._free = list(range(num_pages))
        self._held: list[tuple[Reader, Request]] = []

    def open(self, reader: Reader, request: Request, count: int, hold: Hold) -> int:
        if reader.lease is request.lease or not reader.lease.pages:
            reader.lease = Lease.of(self._max_pages)
            self._held.append((reader, request))
        reader.catch_up()
        count = min(count, self._most - reader.known)
        wanted = -(-(reader.known + count) // self._size)
        while len(reader.lease.pages) < wanted:
            if not self._free and not self._collect():
                return 0
            reader.lease.append(self._free.pop())
        return count

    def _collect(self) -> bool:
        """Free the pages of requests that have ended; whether there were any."""
        for reader, request in self._held:
            if request.state is State.FINISHED:
                self._free += reader.lease.pages
                reader.lease = Lease.of(0)
        self._held = [(reader, r) for reader, r in self._held if r.state is not State.FINISHED]
        return bool(self._free)


class ModelDrafter:
    """One model that drafts for any number of requests at a time."""

    def __init__(
        self, model: PackedModel, store: Store, sampler: Sampler, config: EngineConfig, max_pages: int
    ) -> None:
        self.times = StepTimes()  # of passes of one token a request
        self.store = store
        self._model = model
        self._sample = RowSampler(sampler)
        self._most = config.max_num_batched_tokens
        most_seqs = config.max_num_seqs
        self._packer = Packer(self._most, most_seqs, most_seqs, max_pages, config.page_size)
        self._readers: WeakKeyDictionary[Request, Reader] = WeakKeyDictionary()
        # Right and wrong guesses by the model's own probability, greedy ones and sampled ones apart.
        self._hits = [[1.0 + math.sqrt((i + 0.5) / BUCKETS) for i in range(BUCKETS)] for _ in range(2)]
        self._seen = [[2.0] * BUCKETS for _ in range(2)]

    def chance(self, request: Request, probability: float) -> float:
        """That a token is right which the model gives `probability`, if those before it are."""
        kind, bucket = request.params.temperature > 0, _bucket(probability)
        return self._hits[kind][bucket] / self._seen[kind][bucket]

    def learn(self, request: Request, probabilities: Sequence[float], right: Sequence[bool]) -> None:
        kind = request.params.temperature > 0
        for probability, hit in zip(probabilities, right, strict=False):
            bucket = _bucket(probability)
            self._hits[kind][bucket] += hit
            self._seen[kind][bucket] += 1

    def guess(
        self, requests: Sequence[Request], count: int, hold: Hold, go_on: GoOn
    ) -> list[tuple[list[int], list[float]]]:
        """For each request at most `count` tokens and their probabilities; a guess that `go_on` ends is
        shorter."""
        found: list[tuple[list[int], list[float]]] = [([], []) for _ in requests]
        readers = [self._reader(r) for r in requests]
        rooms = [
            self.store.open(reader, r, min(count, r.limit - r.num_tokens - 1), hold)
            for reader, r in zip(readers, requests, strict=True)
        ]
        going = self._caught_up(readers, [i for i, room in enumerate(rooms) if room > 0])
        while going:
            start = time.perf_counter()
            spans = [readers[i].next_span() for i in going]
            tokens, logprobs = self._pass(spans)
            if all(s.num_tokens == 1 for s in spans):
                self.times.took(len(spans), time.perf_counter() - start)
            still = []
            for i, token, logprob in zip(going, tokens, logprobs, strict=True):
                readers[i].computed = readers[i].length
                if token < 0 or math.isnan(logprob):
                    continue
                readers[i].guess.append(token)
                found[i][0].append(token)
                found[i][1].append(math.exp(logprob))
                ended = token in requests[i].stop_ids or len(found[i][0]) >= rooms[i]
                if not ended and go_on(i, found[i][1][-1]):
                    still.append(i)
            going = still
        return found

    def _reader(self, request: Request) -> Reader:
        if request not in self._readers:
            self._readers[request] = Reader(request)
        return self._readers[request]

    def _caught_up(self, readers: list[Reader], going: list[int]) -> list[int]:
        """Those whose next pass fits into a batch. What lies further back is computed first, a batch a
        call."""
        left, far = self._most, []
        fit = []
        for i in going:
            missing = readers[i].length - readers[i].computed
            if missing <= left:
                fit.append(i)
                left -= missing
            else:
                far.append(i)
        if fit or not far:
            return fit
        reader = readers[far[0]]
        end = min(reader.length - 1, reader.computed + self._most)
        self._pass([Span(reader, reader.computed, end, end)])
        reader.computed = end
        return []

    def _pass(self, spans: list[Span[Reader]]) -> tuple[list[int], list[float]]:
        tokens, rows = sum(s.num_tokens for s in spans), sum(s.num_rows for s in spans)
        inputs = self._packer.pack(spans, tokens, max(1, rows))
        logits = self._model.forward(inputs, self.store.cache)
        if not rows:
            return [], []
        chunks: list[Any] = spans  # a reader has what the sampler looks at
        sampled = self._sample(logits, chunks)
        return sampled.tokens, sampled.logprobs


def _bucket(probability: float) -> int:
    return min(BUCKETS - 1, int(probability * BUCKETS))


def require_vocabulary(spec: ModelSpec, mine: int, wanted: int) -> None:
    """Raises ConfigError unless both vocabularies have as many tokens."""
    if mine != wanted:
        raise ConfigError(f"{spec} cannot draft: its vocabulary has {mine} tokens, the model's {wanted}")


class DraftModels:
    """The draft models of one engine, each built when it is first asked for."""

    def __init__(
        self,
        build: Build | None,
        target: PackedModel,
        cache: KVCache,
        num_pages: int,
        max_pages: int,
        config: EngineConfig,
        sampler: Sampler,
        stats: Stats,
        one_rank: bool,
    ) -> None:
        self._build = build
        self._target, self._cache = target, cache
        self._num_pages, self._max_pages = num_pages, max_pages
        self._config, self._sampler, self._stats = config, sampler, stats
        self._one_rank = one_rank
        self._made: dict[ModelSpec, ModelDrafter] = {}

    def of(self, spec: ModelSpec) -> ModelDrafter:
        """Raises ConfigError for a model that cannot draft here."""
        if spec not in self._made:
            self._made[spec] = self._make(spec)
        return self._made[spec]

    def _make(self, spec: ModelSpec) -> ModelDrafter:
        if not self._one_rank:
            raise ConfigError(f"{spec} drafts on one rank only; speculate='ngram' drafts on several")
        if self._build is None:
            raise ConfigError(f"{spec} drafts only for an engine that build_engine made of a model")
        built = self._build(spec)
        model, target, size = built.model, self._target, self._config.page_size
        require_vocabulary(spec, model.vocab_size, target.vocab_size)
        store: Store
        if isinstance(spec, SelfDraft):
            if model.kv_bytes_per_page(size) != target.kv_bytes_per_page(size):
                raise ConfigError(f"{spec} cannot draft: its keys and values are not the model's")
            store = EngineCache(self._cache)
        else:
            store = OwnCache(model, self._num_pages, size, self._max_pages)
        self._stats.draft_weight_bytes += built.weight_bytes
        self._stats.draft_kv_bytes += store.nbytes
        _log.info(
            "%s drafts: %d bytes of weights, %d of keys and values", spec, built.weight_bytes, store.nbytes
        )
        return ModelDrafter(model, store, self._sampler, self._config, self._max_pages)
