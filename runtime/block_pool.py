"""Paged KV: page allocation, reference counts, and the canonical prefix cache.

A page holds `page_size` consecutive positions of one sequence. Full pages of canonical KV may be shared: they
are found by a hash chained over (contract, token ids from position 0), so equal keys mean equal bits. Pages
that nobody references but that the cache still knows are evicted in least-recently-used order when the free
list is empty. Pages may be borrowed for work that can begin anew: a request that needs them takes them back.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llm42c.capture.packed import KVCache


class BlockPool:
    def __init__(self, num_pages: int, page_size: int, salt: bytes) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        # Which shape wrote a position: 0 = verifier, else an id that the certificates know.
        self.origin = np.zeros((num_pages, page_size), dtype=np.int32)
        self._salt = hashlib.blake2b(salt, digest_size=16).digest()
        self.recalls = 0  # whatever was borrowed before the last one is lost
        self.clear()

    def clear(self) -> None:
        """Every page is free, and nothing is cached."""
        self.refs = [0] * self.num_pages
        # 1: every position was written (or audited) by the verifier graph
        self.proved = bytearray(self.num_pages)
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, unreferenced, oldest first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._borrowed: dict[int, None] = {}
        self.recalls += 1

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can still hand out."""
        return len(self._free) + len(self._idle) + len(self._borrowed)

    @property
    def num_spare(self) -> int:
        """Pages that `allocate` hands out without taking back what is borrowed."""
        return len(self._free) + len(self._idle)

    def allocate(self) -> int | None:
        """A page with one reference, or None when all are referenced."""
        if not self._free and not self._idle and self._borrowed:
            self.recall()
        page = self._take()
        if page is not None:
            self.refs[page] = 1
            self.proved[page] = 0
        return page

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        page, _ = self._idle.popitem(last=False)
        self._forget(page)
        return page

    def borrow(self, count: int) -> list[int] | None:
        """`count` pages until `give_back`, or until `recalls` changes: `allocate` takes all of them back when
        no others are left. None, and nothing borrowed, when there are not so many."""
        if self.num_spare < count:
            return None
        pages = [page for _ in range(count) if (page := self._take()) is not None]
        self._borrowed |= dict.fromkeys(pages)
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """Return what was borrowed; pages that were recalled meanwhile are not the caller's to return."""
        for page in pages:
            del self._borrowed[page]
            self._free.append(page)

    def recall(self) -> None:
        """Take back everything that is borrowed."""
        self.recalls += 1
        self._free += self._borrowed
        self._borrowed = {}

    def retain(self, page: int) -> None:
        if self.refs[page] == 0:
            del self._idle[page]
        self.refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give back a reference of each page; a sequence's end becomes evictable before its beginning."""
        for page in reversed(pages):
            self.refs[page] -= 1
            if self.refs[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def key(self, parent: bytes | None, tokens: Sequence[int]) -> bytes:
        """Cache key of the full page `tokens` that follows the page with key `parent` (None: first page)."""
        data = np.asarray(tokens, dtype=np.int64).tobytes()
        return hashlib.blake2b((parent or self._salt) + data, digest_size=16).digest()

    def lookup(self, key: bytes) -> int | None:
        return self._page_of.get(key)

    def is_idle(self, page: int) -> bool:
        return self.refs[page] == 0

    def register(self, page: int, key: bytes, proved: bool) -> None:
        """Offer a full canonical page for sharing; the first page of a key stays the shared one."""
        self.proved[page] = proved
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def drop_unproved(self) -> None:
        """Stop sharing every page that only a certificate vouches for."""
        for page in [p for p in self._key_of if not self.proved[p]]:
            self._forget(page)
            if self.refs[page] == 0:
                del self._idle[page]
                self._free.append(page)

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]


def read_kv(cache: KVCache, slots: Tensor, page_size: int) -> list[Tensor]:
    """KV at `slots` [N] int64 (page * page_size + offset): for each layer k then v, each [N, num_kv_heads,
    head_dim].
    """
    pages, offsets = slots // page_size, slots % page_size
    found = []
    for k, v in zip(cache.k, cache.v, strict=True):
        found.append(k[pages, :, :, offsets])  # k: [num_pages, H, D, page]
        found.append(v[pages, :, offsets])  # v: [num_pages, H, page, D]
    return found


def kv_rows_equal(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Which of N positions have equal bits in every layer. Both as from `read_kv`; [N] bool on the CPU."""
    same = torch.ones(a[0].shape[0], dtype=torch.bool, device=a[0].device)
    for x, y in zip(a, b, strict=True):
        same &= (as_bits(x) == as_bits(y)).flatten(1).all(dim=1)
    return same.cpu()


def as_bits(x: Tensor) -> Tensor:
    """`x` seen as integers of the same width, so that NaN equals NaN and -0 differs from 0."""
    if not x.dtype.is_floating_point:
        return x
    return x.contiguous().view(
        {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[x.element_size()]
    )


def kv_digest(cache: KVCache, slots: Tensor, page_size: int) -> str:
    """Digest of the KV bits at `slots`, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in read_kv(cache, slots, page_size):
        digest.update(as_bits(part).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
