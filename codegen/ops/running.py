"""Running sums and products along a dimension, from its beginning.

``y[i] = x[0] ∘ x[1] ∘ … ∘ x[i]``, in fp32, i ascending; each result is rounded to ``x.dtype``, the running
value is not. What stands behind i, and how much, cannot be seen in ``y[i]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.ops.registry import Operator

_CHAIN = "one fp32 chain over the dimension, ascending, whose every value is rounded once"


def _fake(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sum_reference(x: Tensor, dim: int) -> Tensor:
    """In fp64, not rounded to ``x.dtype``."""
    return x.double().cumsum(dim)


def _product_reference(x: Tensor, dim: int) -> Tensor:
    """In fp64, not rounded to ``x.dtype``."""
    return x.double().cumprod(dim)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.dim = inputs[1]


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.llm42.running_sum(grad.flip(ctx.dim), ctx.dim).flip(ctx.dim), None


# x: any shape but [], fp32, bf16 or fp16 → x with its sums from the beginning of ``dim``. Raises ValueError
# for a dimension that x does not have.
SUM = Operator(
    schema="running_sum(Tensor x, int dim) -> Tensor",
    fake=_fake,
    reference=_sum_reference,
    reduction=_CHAIN,
    backward=_sum_backward,
    setup_context=_setup_context,
)

# Likewise with products.
PRODUCT = Operator(
    schema="running_product(Tensor x, int dim) -> Tensor",
    fake=_fake,
    reference=_product_reference,
    reduction=_CHAIN,
)

OPERATORS = (SUM, PRODUCT)
