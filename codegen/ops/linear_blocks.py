"""Products of bf16 numbers in blocks of 32 values of k: the order in which AMX adds.

The operators are those of ``linear.py`` on the same packed weights; only the order of the sums is another.
AMX computes a block in one instruction; a CPU without it does the same steps one by one, at half the rate of
chains or less. So a choice (``Options.products``), not the order of all machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.examples import OUT, ROWS, Numbers, Packed
from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.ops import linear as chains
from llm42c.codegen.order import TWO_CHAINS

_WIDTHS = (32 + 6, 64)  # a part of a block at the end, and none


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    for k in _WIDTHS if r.dtype == torch.bfloat16 else ():
        x, packed, bias = r(ROWS, k), Packed(r(OUT, k)), r(OUT)
        yield x, packed, bias, OUT
        yield x[:1], packed, None, OUT


@operator(
    orders={"cpu": TWO_CHAINS},
    tokens=Tokens.ROWS,
    product=lambda x, packed, bias, n: n,
    examples=_examples,
)
def linear_blocks(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """As ``linear``, of bf16 alone. x: [..., K], packed of [N, K], bias: [N] → [..., N]."""
    return chains.linear.reference(x, packed, bias, n)


@linear_blocks.fake
def _fake(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return chains.linear.meta(x, packed, bias, n)


@linear_blocks.simulator(TWO_CHAINS)
def _simulated(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return simulate.linear(x, packed, bias, simulate.blocks)


def _silu_mul_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    for k in _WIDTHS if r.dtype == torch.bfloat16 else ():
        yield r(ROWS, k), Packed(r(OUT, k)), OUT // 2


@operator(
    orders={"cpu": TWO_CHAINS},
    tokens=Tokens.ROWS,
    product=lambda x, packed, n: 2 * n,
    examples=_silu_mul_examples,
)
def linear_silu_mul_blocks(x: Tensor, packed: Tensor, n: int) -> Tensor:
    """As ``linear_silu_mul``: packed of merged gate and up rows [2N, K] → [..., N]."""
    return chains.linear_silu_mul.reference(x, packed, n)


@linear_silu_mul_blocks.fake
def _silu_mul_fake(x: Tensor, packed: Tensor, n: int) -> Tensor:
    return chains.linear_silu_mul.meta(x, packed, n)


@linear_silu_mul_blocks.simulator(TWO_CHAINS)
def _silu_mul_simulated(x: Tensor, packed: Tensor, n: int) -> Tensor:
    return simulate.silu_mul(_simulated(x, packed, None, 2 * n))


def _add_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    for k in _WIDTHS if r.dtype == torch.bfloat16 else ():
        yield r(ROWS, k), Packed(r(OUT, k)), None, r.skip(OUT)(ROWS, OUT), OUT


@operator(
    orders={"cpu": TWO_CHAINS},
    tokens=Tokens.ROWS,
    product=lambda x, packed, bias, residual, n: n,
    examples=_add_examples,
)
def linear_add_blocks(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int) -> Tensor:
    """As ``linear_add``: residual: [..., N] → residual + linear_blocks(x, packed, bias)."""
    return chains.linear_add.reference(x, packed, bias, residual, n)


@linear_add_blocks.fake
def _add_fake(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int) -> Tensor:
    return chains.linear_add.meta(x, packed, bias, residual, n)


@linear_add_blocks.simulator(TWO_CHAINS)
def _add_simulated(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int) -> Tensor:
    return (residual.float() + _simulated(x, packed, bias, n).float()).to(x.dtype)
