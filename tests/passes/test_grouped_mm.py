"""Grouped products of a mixture's experts: rows that do not know who shares their expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits
from torch import Tensor, nn
from transformers.integrations import moe  # noqa: F401  (defines transformers::grouped_mm_fallback)

from llm42c.passes.base import Context
from llm42c.passes.check import unplaced
from llm42c.passes.grouped_mm import grouped_mm
from llm42c.passes.topk import topk

E, K, N, CHOSEN = 4, 72, 40, 2
_random = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(E, K, N, generator=_random) / K**0.5
X = torch.randn(23, K, generator=_random)
EXPERTS = torch.randint(E, (23 * CHOSEN,), generator=_random)


def _fallback(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, w, offs)


def _library(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x, w, offs=offs)


def _private(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return torch._grouped_mm(x, w, offs=offs)


class _Mixture(nn.Module):
    """The experts' products in the order of (token, choice): [T·CHOSEN, N]."""

    def __init__(self, product: Any, dtype: torch.dtype = torch.float32, bins: int = E) -> None:
        super().__init__()
        self.weight, self.product, self.bins = nn.Parameter(WEIGHT.to(dtype)), product, bins

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        keys, perm = torch.sort(experts)
        counts = torch.histc(keys.float(), bins=self.bins, min=0, max=self.bins - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        rows = self.product(x[perm // CHOSEN], self.weight, offsets[:E])
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.size(0))
        return rows[inverse]


def _expected(x: Tensor, experts: Tensor) -> Tensor:
    rows = x.repeat_interleave(CHOSEN, 0)
    return torch.ops.llm42.grouped_linear(rows, WEIGHT.to(x.dtype), None, experts, True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("product", "dtype"),
    [
        (_fallback, torch.float32),
        (_fallback, torch.bfloat16),
        (_library, torch.bfloat16),
        (_private, torch.bfloat16),
    ],
)
def test_sorted_rows(product: Any, dynamic: bool, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    gm = capture(_Mixture(product, dtype), x, EXPERTS, dynamic=dynamic)
    report = apply(gm, grouped_mm)
    assert (len(report.matches), report.misses) == (1, [])
    assert "histc" not in calls(gm)
    assert "cumsum" not in calls(gm)
    apply(gm, topk)  # the router's
    assert not unplaced(gm.graph)
    assert same_bits(run(gm), _expected(x, EXPERTS))


def test_offsets_of_unknown_origin() -> None:
    """Case 4; the last rows belong to no group."""
    offsets = torch.tensor([5, 5, 17, 40], dtype=torch.int32)
    rows = X.repeat(2, 1)
    gm = capture(_fallback, rows, WEIGHT, offsets)
    assert len(apply(gm, grouped_mm).matches) == 1
    group = torch.tensor([0] * 5 + [2] * 12 + [3] * 29)
    assert same_bits(run(gm), torch.ops.llm42.grouped_linear(rows, WEIGHT, None, group, True))


def test_counts_of_other_bins_are_not_taken_for_the_keys() -> None:
    gm = capture(_Mixture(_fallback, bins=E + 1), X, EXPERTS)
    assert len(apply(gm, grouped_mm).matches) == 1
    assert "histc" in calls(gm)
    assert same_bits(run(gm), _expected(X, EXPERTS))


def test_the_library_shows_who_shares_an_expert() -> None:
    """The control: without the pass a row's bits change with the rows beside it; with it, they do not."""
    few = slice(0, 3)
    differ = 0
    for rewritten in (False, True):
        outs = []
        for x, experts in ((X, EXPERTS), (X[few], EXPERTS[: 3 * CHOSEN])):
            gm = capture(_Mixture(_fallback), x, experts)
            if rewritten:
                apply(gm, grouped_mm)
            outs.append(run(gm))
        same = same_bits(outs[0][: 3 * CHOSEN], outs[1])
        differ += not same
        assert same or not rewritten
    assert differ == 1


def test_near_misses() -> None:
    gm = capture(_Mixture(_fallback, torch.float64), X.double(), EXPERTS)
    report = apply(gm, grouped_mm)
    assert report.reasons() == {"dtype torch.float64": 1}
    assert unplaced(gm.graph)

    def sums_over_rows(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        return torch._grouped_mm(a.t(), b, offs=offs)

    a, b = torch.randn(16, 32).bfloat16(), torch.randn(16, 32).bfloat16()
    gm = capture(sums_over_rows, a, b, torch.tensor([8, 16], dtype=torch.int32))
    report = apply(gm, grouped_mm)
    assert report.reasons() == {"not a product of rows with the matrices of their groups": 1}


def test_in_a_graph_that_is_differentiated() -> None:
    gm = capture(_Mixture(_fallback), X, EXPERTS)
    assert len(apply(gm, grouped_mm, ctx=Context(grad=True)).matches) == 1
