"""Sums, softmax and log-softmax of rows in one fixed order.

They replace ``sum``, ``mean``, ``softmax`` and ``log_softmax`` where a compiler or library is free to
choose the order by the shape. All accumulate in fp32 in sixteen lanes (see ``norm.py``) and round once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.ops.registry import Operator

_LANES = "sixteen fp32 lane sums (element i in lane i % 16, ascending), then the tree +8, +4, +2, +1"


def _reduced(x: Tensor, dim: list[int]) -> list[int]:
    """The reduced dimensions, ascending; an empty list means all, as in ``torch.sum``."""
    return sorted(d % x.dim() for d in dim) if dim else list(range(x.dim()))


def _row_sum_fake(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    reduced = _reduced(x, dim)
    sizes = [1 if i in reduced else s for i, s in enumerate(x.shape) if keepdim or i not in reduced]
    return x.new_empty(sizes)


def _row_sum_reference(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    return x.double().sum(dim=_reduced(x, dim), keepdim=keepdim)


def _row_sum_setup(ctx: Any, inputs: tuple[Tensor, list[int], bool], output: Tensor) -> None:
    x, dim, _ = inputs
    ctx.shape, ctx.dim = x.shape, _reduced(x, dim)


def _row_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept = [1 if i in ctx.dim else s for i, s in enumerate(ctx.shape)]
    return grad.reshape(kept).expand(ctx.shape), None, None


def _softmax_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _softmax_reference(x: Tensor) -> Tensor:
    return torch.softmax(x.double(), dim=-1)


def _log_softmax_reference(x: Tensor) -> Tensor:
    return torch.log_softmax(x.double(), dim=-1)


def _save_output(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, grad: Tensor) -> Tensor:
    y, g = ctx.saved_tensors[0].float(), grad.float()
    return (y * (g - (g * y).sum(-1, keepdim=True))).to(grad.dtype)


def _log_softmax_backward(ctx: Any, grad: Tensor) -> Tensor:
    y, g = ctx.saved_tensors[0].float(), grad.float()
    return (g - y.exp() * g.sum(-1, keepdim=True)).to(grad.dtype)


# x: any shape, floating point → x summed over ``dim`` (empty: all), in ascending order of dimensions and
# of indices, in x.dtype.
ROW_SUM = Operator(
    schema="row_sum(Tensor x, int[] dim, bool keepdim) -> Tensor",
    fake=_row_sum_fake,
    reference=_row_sum_reference,
    reduction=_LANES,
    backward=_row_sum_backward,
    setup_context=_row_sum_setup,
)

# x: [..., N] → exp(x - max) / sum over the last dimension, in x.dtype.
ROW_SOFTMAX = Operator(
    schema="row_softmax(Tensor x) -> Tensor",
    fake=_softmax_fake,
    reference=_softmax_reference,
    reduction=_LANES,
    backward=_softmax_backward,
    setup_context=_save_output,
)

# x: [..., N] → (x - max) - log(sum of exp(x - max)), in x.dtype.
ROW_LOG_SOFTMAX = Operator(
    schema="row_log_softmax(Tensor x) -> Tensor",
    fake=_softmax_fake,
    reference=_log_softmax_reference,
    reduction=_LANES,
    backward=_log_softmax_backward,
    setup_context=_save_output,
)

OPERATORS = (ROW_SUM, ROW_SOFTMAX, ROW_LOG_SOFTMAX)
