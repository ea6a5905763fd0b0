"""Running sums and products along a dimension, from its beginning.

``y[i] = x[0] ∘ x[1] ∘ … ∘ x[i]``, in fp32, i ascending; each result is rounded to ``x.dtype``, the running
value is not. What stands behind i, and how much, cannot be seen in ``y[i]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.order import RUNNING


@operator(orders={"cpu": RUNNING, "cuda": RUNNING}, tokens=Tokens.ALONG)
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


@operator(orders={"cpu": RUNNING, "cuda": RUNNING}, tokens=Tokens.ALONG)
def running_product(x: Tensor, dim: int) -> Tensor:
    """Likewise with products.

    In fp64, not rounded to ``x.dtype``.
    """
    return x.double().cumprod(dim)


@running_sum.fake
@running_product.fake
def _fake(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
