"""Comparing a shape of the fast graph with the verifier graph, bit for bit.

Three random sequences are computed once by the verifier graph, in order; their KV and a digest of every row
of logits are the reference. A probe then runs the graph in question on batches composed of pieces of these
sequences — decodes at many positions, prompt chunks at odd offsets, padding — over permuted physical pages
with stale contents, and compares every row of logits and every KV entry that was written.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from llm42c.capture.packed import KVCache, PackedInputs, PackedModel
from llm42c.errors import ConfigError, RankFailureError, RanksDifferError
from llm42c.parallel.ranks import ALONE, Ranks
from llm42c.runtime.block_pool import BlockPool, as_bits, kv_rows_equal, read_kv
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.packing import Packer, Span, slots_of
from llm42c.runtime.request import Lease

# One beyond a KV split of 256 positions, one of a few pages, one of few tokens.
LENGTHS = (320, 150, 45)
LEAST_PAGES = 3  # one of a reference, in two places, and one of a piece
T = TypeVar("T")


@dataclass
class Piece:
    """A reference sequence, or a private continuation of one, in the form that the packer takes."""

    tokens: list[int]
    source: int  # index of the reference sequence
    lease: Lease

    def token_slice(self, start: int, end: int) -> list[int]:
        return self.tokens[start:end]


class Probe:
    """Compares in pages borrowed from the engine's own cache, so that probing takes no memory of its own.

    The reference keeps its pages between forwards, a composition for one forward. Requests take pages back
    when they run out; then the reference is made anew once there is room. Sequences are as long, and batches
    as full, as the pool allows.

    On several ranks a probe fails on all of them or on none, and raises RankFailureError where that cannot
    be: a rank that fails in a forward pass leaves the others in the middle of a sum.
    """

    def __init__(
        self,
        fast: PackedModel,
        verifier: PackedModel,
        config: EngineConfig,
        max_len: int,
        cache: KVCache,
        pool: BlockPool,
        ranks: Ranks = ALONE,
    ) -> None:
        """Raises ConfigError for a pool of fewer than LEAST_PAGES pages."""
        if pool.num_pages < LEAST_PAGES:
            raise ConfigError(
                f"the KV budget holds {pool.num_pages} pages, and comparing graphs takes {LEAST_PAGES}; "
                "raise kv_cache_bytes (or num_pages)"
            )
        self.fast = fast
        self._ranks = ranks
        self.max_pages = -(-max_len // config.page_size)
        self.verifier = verifier
        self._config = config
        self._cache = cache
        self._pool = pool
        self.pages = min(pool.num_pages, enough_pages(config, max_len))
        self._sizes = lengths(max_len, self.pages, config.page_size)
        self._reference: Reference | None = None
        self._name = ranks.share(secrets.token_hex(8))
        self._forwards = 0
        self._compositions: list[list[Cut]] = []  # that are left of the current comparison
        self.starved = False  # the last attempt found too few free pages

    @property
    def identity(self) -> tuple[int, ...]:
        """What a verdict depends on besides the graphs and `pages`; with more pages a probe finds more."""
        return self._config.max_num_seqs, self.max_pages, self._config.probe_compositions

    @property
    def _room(self) -> int:
        """Pages for the pieces of one composition, while the reference lies in two places."""
        return self.pages - 2 * num_pages(self._sizes, self._config.page_size)

    def pages_for(self, num_running: int) -> int:
        """Pages that must not be in use for the current comparison to run to its end, while so many requests
        grow."""
        size = self._config.page_size
        pieces = max((sum(c.num_pages(size) for c in cuts) for cuts in self._compositions), default=0)
        reference = self._reference
        whole = sum(-(-n // self._config.verify_chunk) for n in self._sizes)
        left = len(self._compositions) + (whole if reference is None or reference.lost else reference.left)
        # A step may add a token by the fast graph and one by the verifier.
        growth = 1 + -(-2 * left // size)
        return 2 * num_pages(self._sizes, size) + pieces + num_running * growth

    def check_verifier(self) -> Iterator[bool | None]:
        """Run the verifier on other compositions than the reference is made of; yields as `compare` does."""
        shape = self._config.verify_tokens, self._config.rows
        return self._begin(self.verifier, shape, self._config.verify_seqs)

    def compare(self, shape: tuple[int, int]) -> Iterator[bool | None]:
        """Compare the fast graph at `shape`; yields None between forwards and the verdict at last. Without
        enough free pages it yields None too, and `starved` is set."""
        return self._begin(self.fast, shape, self._config.max_num_seqs)

    def _begin(self, model: PackedModel, shape: tuple[int, int], num_seqs: int) -> Iterator[bool | None]:
        rng = np.random.default_rng([*shape, num_seqs])
        self._compositions = [
            compose(rng, kind, shape, num_seqs, self._sizes, self._room, self._config.page_size)
            for kind in range(self._config.probe_compositions)
        ]
        return self._compare(model, shape, num_seqs)

    def _compare(self, model: PackedModel, shape: tuple[int, int], num_seqs: int) -> Iterator[bool | None]:
        while self._compositions:
            while (mine := self._attempt(model, shape, num_seqs, self._compositions[0])) is None:
                yield None
            # A rank sees the keys and values of its own heads only.
            if not self._ranks.agree(torch.tensor(mine)):
                yield False
                return
            del self._compositions[0]
            yield None
        yield True

    def _attempt(
        self, model: PackedModel, shape: tuple[int, int], num_seqs: int, cuts: list[Cut]
    ) -> bool | None:
        """At most one forward: the reference's next (then None), or the composition's: whether it agrees."""
        pool, reference = self._pool, self._reference
        if reference is None or reference.lost:
            self._reference = None
            pages = pool.borrow(num_pages(self._sizes, self._config.page_size))
            self.starved = pages is None
            if pages is None:
                return None
            reference = self._reference = self._together(lambda: self._new_reference(pages))
        chunk = self._together(reference.next)
        if chunk is not None:
            logits = self._forward(self.verifier, chunk.inputs)
            self._together(lambda: reference.take(chunk, logits))
            return None
        lent = pool.borrow(reference.pages_for(cuts))
        self.starved = lent is None
        if lent is None:
            return None
        spans, inputs = self._together(lambda: reference.stage(shape, num_seqs, cuts, lent))
        logits = self._forward(model, inputs)
        agrees = self._together(lambda: reference.agrees(spans, logits))
        pool.give_back(lent)
        return agrees

    def _new_reference(self, pages: list[int]) -> Reference:
        vocab = self.verifier.vocab_size
        return Reference(vocab, self._config, self._sizes, self.max_pages, self._cache, self._pool, pages)

    def _together(self, work: Callable[[], T]) -> T:
        """`work`, in which no rank needs another: done on all ranks, or an exception on all of them."""
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        if self._ranks.agree(torch.tensor(error is None)):
            return result
        raise error or RuntimeError("it failed on another rank")

    def _forward(self, model: PackedModel, inputs: PackedInputs) -> Tensor:
        self._forwards += 1
        try:
            return model.forward(inputs, self._cache)
        except (RankFailureError, RanksDifferError):
            raise
        except Exception as error:
            if self._ranks.all_report(f"probe {self._name}/{self._forwards}"):
                raise
            raise RankFailureError(
                f"a probe failed on rank {self._ranks.rank} and not on all: {type(error).__name__}: {error}"
            ) from error

    def release(self) -> None:
        """Give every page back; what was broken off begins anew."""
        self._reference = None
        self._pool.recall()


@dataclass(frozen=True)
class ReferenceChunk:
    """The next positions of a reference sequence, packed for the verifier graph."""

    source: int
    count: int
    inputs: PackedInputs


class Reference:
    """Random sequences in borrowed pages, and the verifier graph's logits at each of their positions."""

    def __init__(
        self,
        vocab_size: int,
        config: EngineConfig,
        sizes: Sequence[int],
        max_pages: int,
        cache: KVCache,
        pool: BlockPool,
        pages: list[int],
    ) -> None:
        self._config = config
        self._max_pages = max_pages
        self._cache = cache
        self._pool = pool
        self._recalls = pool.recalls
        self._pages = pages
        rng = np.random.default_rng(0)
        self._pieces: list[Piece] = []
        first = 0
        for i, length in enumerate(sizes):
            tokens = rng.integers(0, vocab_size, length).tolist()
            count = -(-length // config.page_size)
            self._pieces.append(Piece(tokens, i, Lease.of(max_pages, pages[first : first + count])))
            first += count
        self._place = {page: i for i, page in enumerate(pages)}
        self._rows: list[list[bytes]] = [[] for _ in self._pieces]  # digest of the logits at each position
        self._packer = Packer(
            config.verify_tokens, config.verify_seqs, config.rows, max_pages, config.page_size
        )

    @property
    def lost(self) -> bool:
        """Whether its pages were taken back."""
        return self._recalls != self._pool.recalls

    @property
    def left(self) -> int:
        """Forwards until all positions are there."""
        missing = (len(p.tokens) - len(rows) for p, rows in zip(self._pieces, self._rows, strict=True))
        return sum(-(-n // self._config.verify_chunk) for n in missing)

    def next(self) -> ReferenceChunk | None:
        """The next positions, in order; None when all are there."""
        config = self._config
        for piece, rows in zip(self._pieces, self._rows, strict=True):
            start = len(rows)
            end = min(len(piece.tokens), start + config.verify_chunk)
            if end > start:
                span = Span(piece, start, end, start)
                inputs = self._packer.pack([span], config.verify_tokens, config.rows)
                return ReferenceChunk(piece.source, end - start, inputs)
        return None

    def take(self, chunk: ReferenceChunk, logits: Tensor) -> None:
        """Remember the verifier graph's `logits` of `chunk`."""
        self._rows[chunk.source] += row_digests(logits[: chunk.count])

    def pages_for(self, composition: list[Cut]) -> int:
        """Pages of `stage`: the reference in another place, and private pages of each piece."""
        return len(self._pages) + sum(c.num_pages(self._config.page_size) for c in composition)

    def stage(
        self, shape: tuple[int, int], num_seqs: int, composition: list[Cut], pages: list[int]
    ) -> tuple[list[Span[Piece]], PackedInputs]:
        """`composition` placed in `pages` and packed for a graph at `shape`."""
        spans = self._place_pieces(composition, pages)
        packer = Packer(shape[0], num_seqs, shape[1], self._max_pages, self._config.page_size)
        return spans, packer.pack(spans, *shape)

    def agrees(self, spans: list[Span[Piece]], logits: Tensor) -> bool:
        """Whether a graph gave the reference's bits: `logits`, and the KV that it wrote for `spans`."""
        config = self._config
        expected = [self._rows[s.request.source][p] for s in spans for p in range(s.first_row, s.end)]
        if row_digests(logits[: len(expected)]) != expected:
            return False
        written, wanted = [], []
        for span in spans:
            positions = np.arange(span.start, span.end)
            written.append(slots_of(span.request, positions, config.page_size))
            wanted.append(slots_of(self._pieces[span.request.source], positions, config.page_size))
        new, old = (torch.from_numpy(np.concatenate(x)) for x in (written, wanted))
        same = kv_rows_equal(
            read_kv(self._cache, new, config.page_size), read_kv(self._cache, old, config.page_size)
        )
        return bool(same.all())

    def _place_pieces(self, composition: list[Cut], pages: list[int]) -> list[Span[Piece]]:
        """Put each piece's history into permuted `pages`, with stale data where its KV is to be written.

        Full pages of history are shared by all pieces of a sequence, as prefix hits are; the others are
        private.
        """
        size = self._config.page_size
        physical = np.random.default_rng(len(pages)).permutation(np.array(pages, dtype=np.int64))
        moved, physical = physical[: len(self._pages)], physical[len(self._pages) :]
        origin = [np.array(self._pages, dtype=np.int64)]  # which reference page each physical page starts as
        target = [moved]
        stale, foreign = [], []
        spans: list[Span[Piece]] = []
        for cut in composition:
            source = self._pieces[cut.source]
            shared, used = cut.start // size, -(-cut.end // size)
            own, physical = physical[: used - shared], physical[used - shared :]
            target.append(own)
            origin.append(np.array(source.lease.pages[shared:used], dtype=np.int64))
            whole = [*(moved[self._place[p]] for p in source.lease.pages[:shared]), *own]
            piece = Piece(source.tokens, cut.source, Lease.of(self._max_pages, whole))
            positions = np.arange(cut.start, used * size)
            stale.append(slots_of(piece, positions, size))
            foreign.append(source.lease.block_row[positions // size] * size + (positions + 1) % size)
            spans.append(Span(piece, cut.start, cut.end, cut.end - cut.rows))
        _copy_pages(self._cache, _joined(target), _joined(origin))
        _copy_slots(self._cache, _joined(stale), _joined(foreign), size)
        return spans


@dataclass(frozen=True)
class Cut:
    """Positions [start, end) of reference sequence `source`; logits of the last `rows` wanted."""

    source: int
    start: int
    end: int
    rows: int

    def num_pages(self, page_size: int) -> int:
        """Pages that no other piece shares."""
        return -(-self.end // page_size) - self.start // page_size


def compose(
    rng: np.random.Generator,
    kind: int,
    shape: tuple[int, int],
    num_seqs: int,
    size: Sequence[int],
    room: int,
    page_size: int,
) -> list[Cut]:
    """Pieces of sequences of length `size` for one batch of `shape`: by `kind` mostly decodes, mostly prompt
    chunks, or a mixture with padding. At most `room` pages of their own; at least one piece.
    """
    tokens, rows = shape
    if kind % 3 == 2:
        tokens = max(1, tokens - int(rng.integers(0, tokens // 3 + 1)))
    decodes = {0: min(tokens, num_seqs), 1: 0, 2: min(tokens, num_seqs) // 2}[kind % 3]
    if kind % 3 == 0 and tokens > num_seqs:
        decodes = max(0, num_seqs - 2 * -(-tokens // max(size)))
    decodes = min(decodes, room)
    cuts: list[Cut] = []
    for i in range(decodes):
        source = i % len(size)
        at = int(rng.integers(0, size[source]))
        cuts.append(Cut(source, at, at + 1, min(rows, 1)))
        rows -= cuts[-1].rows
    left, room = tokens - decodes, room - decodes
    while left > 0 and room > 0 and len(cuts) < num_seqs:
        if left * 2 > (num_seqs - len(cuts) - 1) * size[0]:  # few sequences are left for many tokens
            source, count = 0, min(left, size[0])
        else:
            source = int(rng.integers(0, len(size)))
            count = min(left, int(rng.integers(1, size[source] + 1)))
        start = int(rng.integers(0, size[source] - count + 1))
        count = min(count, room * page_size - start % page_size)
        wanted = min(rows, count if count == left else int(rng.integers(0, count + 1)))
        cuts.append(Cut(source, start, start + count, wanted))
        rows -= wanted
        left -= count
        room -= cuts[-1].num_pages(page_size)
    return [cuts[i] for i in rng.permutation(len(cuts))]


def lengths(max_len: int, pool_pages: int, page_size: int) -> tuple[int, ...]:
    """Lengths of the reference sequences, at most a quarter of the pool (and one page) together."""
    wanted = [min(n, max_len) for n in LENGTHS]
    full = num_pages(wanted, page_size)
    most = max(1, pool_pages // 4)
    if full <= most:
        return tuple(wanted)
    pages = [max(1, -(-n // page_size) * most // full) for n in wanted[:most]]
    return tuple(min(n, p * page_size) for n, p in zip(wanted, pages, strict=False))


def enough_pages(config: EngineConfig, max_len: int) -> int:
    """Pages that no sequence nor batch of a probe needs more than."""
    sequences = num_pages([min(n, max_len) for n in LENGTHS], config.page_size)
    tokens = max(config.max_num_batched_tokens, config.verify_tokens)
    seqs = max(config.max_num_seqs, config.verify_seqs)
    pieces = -(-tokens // config.page_size) + 2 * seqs  # a piece begins and ends inside of pages
    return max(4 * sequences, 2 * sequences + pieces)


def num_pages(sizes: Sequence[int], page_size: int) -> int:
    return sum(-(-n // page_size) for n in sizes)


def row_digests(logits: Tensor) -> list[bytes]:
    """A digest of the bits of each row of `logits` [R, V]."""
    rows = as_bits(logits).contiguous().cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _copy_pages(cache: KVCache, target: Tensor, origin: Tensor) -> None:
    """Page `origin[i]` to page `target[i]`; both [N] int64, no page in both."""
    for x in (*cache.k, *cache.v):
        x[target] = x[origin]


def _copy_slots(cache: KVCache, target: Tensor, origin: Tensor, page_size: int) -> None:
    """Slot `origin[i]` to slot `target[i]`; both [N] int64, no slot in both."""
    (to, at), (of, there) = ((s // page_size, s % page_size) for s in (target, origin))
    for k, v in zip(cache.k, cache.v, strict=True):
        k[to, :, :, at] = k[of, :, :, there]
        v[to, :, at] = v[of, :, there]
