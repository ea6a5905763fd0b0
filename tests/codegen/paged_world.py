"""Sequences with given queries, keys and values, attended to in any schedule, for the attention tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NAN = float("nan")


@dataclass(frozen=True)
class Heads:
    q: int = 6
    kv: int = 2
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


@dataclass(frozen=True)
class World:
    """Some sequences; everything about them that attention may depend on."""

    heads: Heads
    q: list[Tensor]  # each [n, Hq, D]
    k: list[Tensor]  # each [n, Hkv, D]
    v: list[Tensor]
    sinks: Tensor | None

    @classmethod
    def make(cls, lengths: Sequence[int], heads: Heads, seed: int = 0) -> World:
        g = torch.Generator().manual_seed(seed)

        def randn(n: int, h: int) -> Tensor:
            return torch.randn(n, h, heads.dim, generator=g).to(heads.dtype)

        return cls(
            heads,
            [randn(n, heads.q) for n in lengths],
            [randn(n, heads.kv) for n in lengths],
            [randn(n, heads.kv) for n in lengths],
            torch.randn(heads.q, generator=g) if heads.sinks else None,
        )

    def only(self, index: int) -> World:
        return replace(self, q=[self.q[index]], k=[self.k[index]], v=[self.v[index]])


class Runner:
    """Feeds the tokens of a world to the operator, some of each sequence a call, over one paged cache."""

    def __init__(self, world: World, page: int = 16, seed: int = 0, spare_pages: int = 3) -> None:
        self.world, self.page = world, page
        h = world.heads
        counts = [-(-len(q) // page) for q in world.q]
        total = sum(counts) + spare_pages
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).int()
        # Never-written memory and never-used table entries are poison.
        self.k_cache = torch.full((total, h.kv, h.dim, page), NAN, dtype=h.dtype)
        self.v_cache = torch.full((total, h.kv, page, h.dim), NAN, dtype=h.dtype)
        self.tables = list(order.split([*counts, spare_pages]))[:-1]
        self.done = [0] * len(counts)

    def arguments(self, takes: Sequence[tuple[int, int]], padding: int = 0) -> list[object]:
        """Arguments of a call that feeds ``n`` tokens of sequence ``s``, for each ``(s, n)`` in order."""
        w, h = self.world, self.world.heads
        width = max([len(self.tables[s]) for s, _ in takes], default=1)
        table = torch.full((len(takes), width), -7, dtype=torch.int32)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        slots, lens, cu = [], [], [0]
        for row, (s, n) in enumerate(takes):
            begin, end = self.done[s], self.done[s] + n
            parts.append((w.q[s][begin:end], w.k[s][begin:end], w.v[s][begin:end]))
            position = torch.arange(begin, end)
            used = self.tables[s][: -(-end // self.page)]
            table[row, : len(used)] = used
            slots.append(self.tables[s][position // self.page].long() * self.page + position % self.page)
            lens.append(end)
            cu.append(cu[-1] + n)
            self.done[s] = end
        poison = [torch.full((padding, n, h.dim), NAN, dtype=h.dtype) for n in (h.q, h.kv, h.kv)]
        q, k, v = (torch.cat([*[p[i] for p in parts], poison[i]]) for i in range(3))
        slot_mapping = torch.cat([*slots, torch.full((padding,), -1)]).long()
        return [
            *(q, k, v, self.k_cache, self.v_cache, slot_mapping),
            torch.tensor(cu, dtype=torch.int32),
            torch.tensor(lens, dtype=torch.int32),
            *(table, 1 / math.sqrt(h.dim), h.window, h.softcap, w.sinks),
        ]

    def call(self, takes: Sequence[tuple[int, int]], padding: int = 0) -> list[Tensor]:
        out = torch.ops.llm42.paged_attention(*self.arguments(takes, padding))
        rows = sum(n for _, n in takes)
        assert torch.equal(bits(out[rows:]), torch.zeros_like(bits(out[rows:])))
        return list(out[:rows].split([n for _, n in takes]))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def solo(world: World, index: int) -> Tensor:
    """The bits to expect: one sequence alone, in one prefill on one thread, page size 16."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Runner(world.only(index)).call([(0, len(world.q[index]))])[0]
    finally:
        torch.set_num_threads(threads)
