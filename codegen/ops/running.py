"""Running sums and products along a dimension, from its beginning.

``y[i] = x[0] ∘ x[1] ∘ … ∘ x[i]``, in fp32, i ascending; each result is rounded to ``x.dtype``, the running
value is not. What stands behind i, and how much, cannot be seen in ``y[i]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.examples import ROWS, WIDTH, Numbers
from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.order import RUNNING


def _sum_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield r(ROWS, WIDTH), 1


@operator(orders={"cpu": RUNNING, "cuda": RUNNING}, tokens=Tokens.ALONG, examples=_sum_examples)
def running_sum(x: Tensor, dim: int) -> Tensor:
    """x: any shape but [], fp32, bf16 or fp16 → x with its sums from the beginning of ``dim``.

    Raises ValueError for a dimension that x does not have.

    In fp64, not rounded to ``x.dtype``.
    """
    return x.double().cumsum(dim)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.dim = inputs[1]


@running_sum.gradient(_setup_context)
def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.llm42.running_sum(grad.flip(ctx.dim), ctx.dim).flip(ctx.dim), None


def _product_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield 1 + r(ROWS, WIDTH) / 8, 1


@operator(orders={"cpu": RUNNING, "cuda": RUNNING}, tokens=Tokens.ALONG, examples=_product_examples)
def running_product(x: Tensor, dim: int) -> Tensor:
    """Likewise with products.

    In fp64, not rounded to ``x.dtype``.
    """
    return x.double().cumprod(dim)


@running_sum.fake
@running_product.fake
def _fake(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _running(x: Tensor, dim: int, step: Callable[[Tensor, Tensor], Tensor], start: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.full_like(x.select(dim, 0), start, dtype=torch.float32)
    for i in range(x.shape[dim]):
        total = step(total, x.select(dim, i).float())
        out.select(dim, i).copy_(total)
    return out


@running_sum.simulator(RUNNING)
def _sum_simulated(x: Tensor, dim: int) -> Tensor:
    return _running(x, dim, torch.add, -0.0)  # from what changes no first element


@running_product.simulator(RUNNING)
def _product_simulated(x: Tensor, dim: int) -> Tensor:
    return _running(x, dim, torch.mul, 1.0)
