"""Sums of outer products, one for each group of rows: the gradient of the weights of a mixture's experts.

``out[e] = Σ a[i]ᵀ b[i]`` over the rows ``i`` of group ``e``, each element one chain of fused multiply-adds
over ``i`` ascending. It stands in the backward pass of ``grouped_linear`` and may be slow where groups are
many: each is one call of ``linear_dense``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.examples import OUT, ROWS, WIDTH, Numbers
from llm42c.codegen.operator import operator
from llm42c.codegen.order import CHAIN, TILES


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    x, group = r(ROWS, WIDTH), torch.tensor([2, 0, 0, 1, 2, 2, 0])
    yield x, r.skip(OUT * (WIDTH + 1))(ROWS, OUT), group, 3


@operator(orders={"cpu": CHAIN, "cuda": TILES}, examples=_examples)
def grouped_outer(a: Tensor, b: Tensor, group: Tensor, groups: int) -> Tensor:
    """a: [R, N], b: [R, K], one dtype (fp32, bf16, fp16); group: [R] int64 in [0, groups) → [groups, N, K].
    Raises ValueError for a group outside, and where the numbers of rows differ.

    In fp64, not rounded to ``a.dtype``.
    """
    chosen = torch.nn.functional.one_hot(group, groups).double()  # [R, E]
    return torch.einsum("re,rn,rk->enk", chosen, a.double(), b.double())


@grouped_outer.fake
def _fake(a: Tensor, b: Tensor, group: Tensor, groups: int) -> Tensor:
    return a.new_empty(groups, a.shape[1], b.shape[1])


@grouped_outer.simulator(CHAIN)
def _simulated(a: Tensor, b: Tensor, group: Tensor, groups: int) -> Tensor:
    members = [group == e for e in range(groups)]
    return torch.stack([simulate.linear(a[own].T, b[own].T, None) for own in members])


@grouped_outer.implementation("cpu", "cuda")
def _composite(a: Tensor, b: Tensor, group: Tensor, groups: int) -> Tensor:
    order = torch.sort(group, stable=True).indices
    counts = torch.bincount(group, minlength=groups).tolist()
    if len(counts) != groups or not len(group) == len(a) == len(b):
        raise ValueError(
            f"grouped_outer: expected a [R, N], b [R, K] and group [R] in [0, {groups}), got "
            f"{tuple(a.shape)}, {tuple(b.shape)} and {tuple(group.shape)}"
        )
    left, right = a[order].t().contiguous(), b[order].t()  # [N, R], [K, R]
    out, end = a.new_zeros(groups, a.shape[1], b.shape[1]), 0
    for e, count in enumerate(counts):
        begin, end = end, end + count
        if count:
            out[e] = torch.ops.llm42.linear_dense(left[:, begin:end], right[:, begin:end], None)
    return out
