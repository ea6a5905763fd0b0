"""Matrix products with a weight chosen for each row: the experts of a mixture.

Row i of the result is ``linear_dense(x[i], weight[group[i]], bias[group[i]])``, bit for bit: one chain of
fused multiply-adds over k ascending. Which rows share an expert, and how many, cannot be seen in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.examples import OUT, ROWS, WIDTH, Numbers
from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.order import CHAIN, TILES


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    x, group = r(ROWS, WIDTH), torch.tensor([2, 0, 0, 1, 2, 2, 0])
    experts = r.skip(OUT * (WIDTH + 1 + ROWS))(3, OUT, WIDTH)
    yield x, experts, r(3, OUT), group, False


@operator(
    orders={"cpu": CHAIN, "cuda": TILES},
    tokens=Tokens.ROWS,
    product=lambda x, weight, bias, group, transposed: weight.shape[2 if transposed else 1],
    examples=_examples,
)
def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: Tensor, transposed: bool) -> Tensor:
    """x: [R, K]; weight: [E, N, K] ([E, K, N] if transposed), any strides; bias: [E, N] → [R, N] in x.dtype.

    group: [R] int64 in [0, E); dtypes fp32, bf16, fp16. Raises ValueError for a group outside of [0, E); on a
    GPU, which cannot without waiting, such a row is NaN.

    In fp64, not rounded to ``x.dtype``.
    """
    w = (weight if transposed else weight.transpose(1, 2)).double()[group]  # [R, K, N]
    y = (x.double().unsqueeze(1) @ w).squeeze(1)
    return y if bias is None else y + bias.double()[group]


@grouped_linear.fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, group: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2] if transposed else weight.shape[1])


@grouped_linear.simulator(CHAIN)
def _simulated(x: Tensor, weight: Tensor, bias: Tensor | None, group: Tensor, transposed: bool) -> Tensor:
    w = weight.transpose(1, 2) if transposed else weight
    rows = [
        simulate.linear(row, w[e], None if bias is None else bias[e])
        for row, e in zip(x, group.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else x.new_empty(0, w.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, group, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, group)
    ctx.has_bias = bias is not None


@grouped_linear.gradient(_setup_context)
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, group = ctx.saved_tensors
    llm42, groups = torch.ops.llm42, weight.shape[0]
    d_x = d_weight = d_bias = None
    if ctx.needs_input_grad[0]:
        d_x = llm42.grouped_linear(grad, weight, None, group, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        a, b = (x, grad) if ctx.transposed else (grad, x)
        d_weight = llm42.grouped_outer(a, b, group, groups)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        d_bias = llm42.grouped_outer(grad, torch.ones_like(grad[:, :1]), group, groups).squeeze(-1)
    return d_x, d_weight, d_bias, None, None
