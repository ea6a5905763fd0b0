"""Rows that a mixture of experts sorts: halves may sort their own, if nothing else is done with the order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import weave_graphs as wg
from torch import Tensor
from transformers.integrations import moe  # noqa: F401  (defines transformers::grouped_mm_fallback)

from llm42c.codegen.ops import registry
from llm42c.passes.weave.rules import UnsplittableError
from llm42c.passes.weave.split import split_tokens

registry.load()
EXPERTS, CHOSEN = 4, 2
_random = torch.Generator().manual_seed(0)
ROUTER = torch.randn(wg.HIDDEN, EXPERTS, generator=_random)
WEIGHTS = torch.randn(EXPERTS, wg.HIDDEN, wg.HIDDEN, generator=_random) / 6
W = torch.randn(wg.HIDDEN, wg.HIDDEN, generator=_random) / 6


class Routed:
    """Every token's choices: [S] experts and weights; S = T·K pairs, sorted by expert."""

    def __init__(self, y: Tensor) -> None:
        self.y = y  # [T, H]
        chosen = torch.softmax(y @ ROUTER, -1).topk(CHOSEN)
        self.weights, self.experts = chosen.values.reshape(-1), chosen.indices.reshape(-1)
        self.keys, self.index = torch.sort(self.experts)
        self.rows = y[self.index // CHOSEN]  # [S, H]

    def offsets(self, bins: int = EXPERTS) -> Tensor:
        counts = torch.histc(self.keys.float(), bins=bins, min=0, max=bins - 1)
        return torch.cumsum(counts, 0, dtype=torch.int32)

    def inverse(self) -> Tensor:
        inverse = torch.empty_like(self.index)
        inverse[self.index] = torch.arange(self.index.shape[0])
        return inverse

    def restored(self, rows: Tensor) -> Tensor:
        weighted = rows * self.weights[self.index].unsqueeze(-1)
        return weighted[self.inverse()].view(-1, CHOSEN, wg.HIDDEN).sum(1)


def by_key(r: Routed) -> Tensor:
    """Each row with its expert's matrix, which rounds a row alike in any company."""
    up = torch.ops.llm42.grouped_linear(r.rows, WEIGHTS, None, r.keys, True)
    return r.restored(torch.ops.llm42.grouped_linear(up.clamp(min=0.0), WEIGHTS, None, r.keys, True))


def by_offsets(r: Routed) -> Tensor:
    up = torch.ops.transformers.grouped_mm_fallback(r.rows, WEIGHTS, r.offsets())
    return r.restored(torch.ops.transformers.grouped_mm_fallback(up.clamp(min=0.0), WEIGHTS, r.offsets()))


MISUSES: dict[str, Callable[[Routed], Tensor]] = {
    "never put back": lambda r: r.rows.view(-1, CHOSEN, wg.HIDDEN).sum(1),
    "the neighbour in order": lambda r: r.restored(r.rows + r.rows.roll(1, 0)),
    "the largest so far": lambda r: r.restored(r.rows.cummax(0).values),
    "in a row": lambda r: r.restored(torch.cat([r.rows, r.rows])[: r.rows.shape[0]]),
    "place in the order": lambda r: r.y * r.index.view(-1, CHOSEN)[:, :1],
    "how many share an expert": lambda r: r.restored(
        r.rows * torch.histc(r.keys.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)[r.keys].unsqueeze(-1)
    ),
    "groups of other rows": lambda r: r.restored(
        torch.ops.transformers.grouped_mm_fallback(r.y[r.index // CHOSEN], WEIGHTS, r.offsets() + 1)
    ),
    "counts of something else": lambda r: r.restored(
        torch.ops.transformers.grouped_mm_fallback(
            r.rows, WEIGHTS, torch.histc(r.keys.float(), bins=EXPERTS, min=1, max=EXPERTS).cumsum(0).int()
        )
    ),
    "sorted beside unsorted": lambda r: r.restored(r.rows * r.weights.unsqueeze(-1)),
    "the wrong inverse": lambda r: r.rows[r.index].view(-1, CHOSEN, wg.HIDDEN).sum(1),
    "another number of choices": lambda r: r.restored(r.y[r.index // (CHOSEN + 1)]),
}


def _captured(of_routed: Callable[[Routed], Tensor]) -> wg.Graph:
    def model(x: Tensor) -> Tensor:
        y = wg.all_reduce(x @ W)
        return wg.all_reduce(of_routed(Routed(y[0])) * 1.0)[None]

    return wg.Graph(model, wg.tokens(12), 1)


def _both(graph: wg.Graph, cut: int) -> tuple[Any, Any]:
    split = split_tokens(graph.gm)
    assert split.collectives == 2
    x = graph.arguments(wg.tokens(12))
    (whole,), (halves,) = wg.run_whole(split, x), wg.run_halves(split.gm, x, cut)
    return whole, halves


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_halves_sort_their_own_rows(cut: int):
    with wg.group():
        whole, halves = _both(_captured(by_key), cut)
        assert (whole - halves).abs().max() <= 64 * 2.0**-24 * whole.abs().max()  # x @ W is the library's
        whole, halves = _both(_captured(by_offsets), cut)
        assert (whole - halves).abs().max() <= 64 * 2.0**-24 * whole.abs().max()
        assert whole.abs().max() > 0.1


@pytest.mark.parametrize("name", MISUSES)
def test_what_depends_on_the_order_is_refused(name: str):
    with wg.group(), pytest.raises(UnsplittableError, match=r"\w+: "):
        split_tokens(_captured(MISUSES[name]).gm)
