"""Comparing a shape of the fast graph with the verifier graph, bit for bit.

Three random sequences are computed once by the verifier graph, in order; their KV and a digest of every row
of logits are the reference. A probe then runs the graph in question on batches composed of pieces of these
sequences — decodes at many positions, prompt chunks at odd offsets, padding — over permuted physical pages
with stale contents, and compares every row of logits and every KV entry that was written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llm42c.packed import KVCache, PackedModel
from llm42c.ranks import ALONE, Ranks
from llm42c.runtime.block_pool import as_bits, kv_rows_equal, read_kv
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.packing import Packer, Span, slots_of

# One beyond a KV split of 256 positions, one of a few pages, one of few tokens.
LENGTHS = (320, 150, 45)


@dataclass
class Piece:
    """A reference sequence, or a private continuation of one, in the form that the packer takes."""

    tokens: list[int]
    block_row: np.ndarray  # [max_pages] int32
    source: int  # index of the reference sequence
    pages: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)

    def token_slice(self, start: int, end: int) -> list[int]:
        return self.tokens[start:end]

    def use(self, pages: Sequence[int]) -> None:
        self.pages = [int(p) for p in pages]
        self.block_row[: len(pages)] = pages


class Probe:
    """Compares in KV caches of its own: the reference's is kept (some 30 pages), a composition's is not."""

    def __init__(
        self,
        fast: PackedModel,
        verifier: PackedModel,
        config: EngineConfig,
        max_len: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.fast = fast
        self._ranks = ranks
        self.max_pages = -(-max_len // config.page_size)
        self._verifier = verifier
        self._config = config
        self._max_len = max_len
        self._reference: Reference | None = None

    def check_verifier(self) -> Iterator[bool | None]:
        """Run the verifier on other compositions than the reference is made of; yields as `compare` does."""
        shape = self._config.verify_tokens, self._config.rows
        return self._compare(self._verifier, shape, self._config.verify_seqs)

    def compare(self, shape: tuple[int, int]) -> Iterator[bool | None]:
        """Compare the fast graph at `shape`; yields None between forwards and the verdict at last."""
        return self._compare(self.fast, shape, self._config.max_num_seqs)

    def _compare(self, model: PackedModel, shape: tuple[int, int], num_seqs: int) -> Iterator[bool | None]:
        for agrees in self._compositions(model, shape, num_seqs):
            if agrees is False:
                yield False
                return
            yield None
        yield True

    def _compositions(
        self, model: PackedModel, shape: tuple[int, int], num_seqs: int
    ) -> Iterator[bool | None]:
        """One forward at a time: None while the reference is made, then whether each composition agrees."""
        if self._reference is None:
            self._reference = Reference(self._verifier, self._config, self._max_len)
        try:
            yield from self._reference.build()
        except BaseException:
            self._reference = None  # its generator was broken off and never goes on
            raise
        rng = np.random.default_rng([*shape, num_seqs])
        for kind in range(self._config.probe_compositions):
            cuts = compose(rng, kind, shape, num_seqs, self._max_len)
            mine = self._reference.agrees(model, shape, num_seqs, cuts)
            # A rank sees the keys and values of its own heads only.
            yield bool(self._ranks.agree(torch.tensor(mine)))


class Reference:
    def __init__(self, verifier: PackedModel, config: EngineConfig, max_len: int) -> None:
        self._verifier = verifier
        self._config = config
        self._max_pages = -(-max_len // config.page_size)
        rng = np.random.default_rng(0)
        self._pieces = []
        first = 0
        for i, length in enumerate(lengths(max_len)):
            tokens = rng.integers(0, verifier.vocab_size, length).tolist()
            piece = Piece(tokens, np.zeros(self._max_pages, dtype=np.int32), i)
            count = -(-length // config.page_size)
            piece.use(range(first, first + count))
            first += count
            self._pieces.append(piece)
        self._num_pages = first
        self._cache = verifier.new_kv_cache(first, config.page_size)
        self._rows: list[list[bytes]] = [[] for _ in self._pieces]  # digest of the logits at each position
        self._forwards = self._compute()
        self._packers: dict[tuple[int, int], Packer] = {}

    def build(self) -> Iterator[None]:
        """What is left of computing the reference, a forward at a time."""
        yield from self._forwards

    def _compute(self) -> Iterator[None]:
        config = self._config
        packer = Packer(
            config.verify_tokens, config.verify_seqs, config.rows, self._max_pages, config.page_size
        )
        step = min(config.verify_tokens, config.rows)
        for piece, rows in zip(self._pieces, self._rows, strict=True):
            for start in range(0, len(piece.tokens), step):
                end = min(len(piece.tokens), start + step)
                inputs = packer.pack([Span(piece, start, end, start)], config.verify_tokens, config.rows)
                rows += row_digests(self._verifier.forward(inputs, self._cache)[: end - start])
                yield None

    def agrees(
        self, model: PackedModel, shape: tuple[int, int], num_seqs: int, composition: list[Cut]
    ) -> bool:
        """Whether `model` run at `shape` on `composition` gives the reference's bits."""
        config = self._config
        spans, cache = self._stage(composition)
        packer = Packer(*(shape[0], num_seqs, shape[1]), self._max_pages, config.page_size)
        logits = model.forward(packer.pack(spans, *shape), cache)
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
            read_kv(cache, new, config.page_size), read_kv(self._cache, old, config.page_size)
        )
        return bool(same.all())

    def _stage(self, composition: list[Cut]) -> tuple[list[Span[Piece]], KVCache]:
        """A cache with each piece's history in place and stale data elsewhere, over permuted pages.

        Full pages of history are shared by all pieces of a sequence, as prefix hits are; the others are
        private.
        """
        size = self._config.page_size
        private = sum(-(-c.end // size) - c.start // size for c in composition)
        total = self._num_pages + private
        physical = np.random.default_rng(total).permutation(total)
        origin = np.empty(total, dtype=np.int64)  # which reference page a physical page starts as
        origin[physical[: self._num_pages]] = np.arange(self._num_pages)
        stale: list[np.ndarray] = []
        spans: list[Span[Piece]] = []
        fresh = self._num_pages
        for cut in composition:
            source = self._pieces[cut.source]
            piece = Piece(source.tokens, np.zeros(self._max_pages, dtype=np.int32), cut.source)
            shared, used = cut.start // size, -(-cut.end // size)
            own = physical[fresh : fresh + used - shared]
            fresh += used - shared
            origin[own] = source.pages[shared:used]
            piece.use([*physical[np.asarray(source.pages[:shared], dtype=np.int64)], *own])
            stale.append(slots_of(piece, np.arange(cut.start, used * size), size))
            spans.append(Span(piece, cut.start, cut.end, cut.end - cut.rows))
        cache = self._verifier.new_kv_cache(total, size)
        _fill(cache, self._cache, torch.from_numpy(origin), torch.from_numpy(np.concatenate(stale)), size)
        return spans, cache


@dataclass(frozen=True)
class Cut:
    """Positions [start, end) of reference sequence `source`; logits of the last `rows` wanted."""

    source: int
    start: int
    end: int
    rows: int


def compose(
    rng: np.random.Generator, kind: int, shape: tuple[int, int], num_seqs: int, max_len: int
) -> list[Cut]:
    """Pieces for one batch of `shape`: by `kind` mostly decodes, mostly prompt chunks, or a mixture with
    padding.
    """
    size = lengths(max_len)
    tokens, rows = shape
    if kind % 3 == 2:
        tokens = max(1, tokens - int(rng.integers(0, tokens // 3 + 1)))
    decodes = {0: min(tokens, num_seqs), 1: 0, 2: min(tokens, num_seqs) // 2}[kind % 3]
    if kind % 3 == 0 and tokens > num_seqs:
        decodes = max(0, num_seqs - 2 * -(-tokens // max(size)))
    cuts: list[Cut] = []
    for i in range(decodes):
        source = i % len(size)
        at = int(rng.integers(0, size[source]))
        cuts.append(Cut(source, at, at + 1, min(rows, 1)))
        rows -= cuts[-1].rows
    left = tokens - decodes
    while left > 0 and len(cuts) < num_seqs:
        if left * 2 > (num_seqs - len(cuts) - 1) * size[0]:  # few sequences are left for many tokens
            source, count = 0, min(left, size[0])
        else:
            source = int(rng.integers(0, len(size)))
            count = min(left, int(rng.integers(1, size[source] + 1)))
        start = int(rng.integers(0, size[source] - count + 1))
        wanted = min(rows, count if count == left else int(rng.integers(0, count + 1)))
        cuts.append(Cut(source, start, start + count, wanted))
        rows -= wanted
        left -= count
    return [cuts[i] for i in rng.permutation(len(cuts))]


def lengths(max_len: int) -> tuple[int, ...]:
    return tuple(min(n, max_len) for n in LENGTHS)


def row_digests(logits: Tensor) -> list[bytes]:
    """A digest of the bits of each row of `logits` [R, V]."""
    rows = as_bits(logits).contiguous().cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def _fill(cache: KVCache, reference: KVCache, origin: Tensor, stale: Tensor, page_size: int) -> None:
    """Copy reference page `origin[p]` to each page p, then put another position's data into the `stale`
    slots.
    """
    pages, offsets = stale // page_size, stale % page_size
    for new, old in zip(cache.k, reference.k, strict=True):
        new.copy_(old[origin])
        new[pages, :, :, offsets] = old[origin[pages], :, :, (offsets + 1) % page_size]
    for new, old in zip(cache.v, reference.v, strict=True):
        new.copy_(old[origin])
        new[pages, :, offsets] = old[origin[pages], :, (offsets + 1) % page_size]
