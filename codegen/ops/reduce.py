"""Sums, softmax and log-softmax of rows in one fixed order.

They replace ``sum``, ``mean``, ``softmax`` and ``log_softmax`` where a compiler or library is free to
choose the order by the shape. All accumulate in fp32 in sixteen lanes (see ``norm.py``) and round once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.order import LANES, TREE


def _reduced(x: Tensor, dim: list[int]) -> list[int]:
    """The reduced dimensions, ascending; an empty list means all, as in ``torch.sum``."""
    return sorted(d % x.dim() for d in dim) if dim else list(range(x.dim()))


@operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.REDUCED)
def row_sum(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    """x: any shape, floating point → x summed over ``dim`` (empty: all), in x.dtype.

    In ascending order of dimensions and of indices.
    """
    return x.double().sum(dim=_reduced(x, dim), keepdim=keepdim)


@row_sum.fake
def _row_sum_fake(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    reduced = _reduced(x, dim)
    sizes = [1 if i in reduced else s for i, s in enumerate(x.shape) if keepdim or i not in reduced]
    return x.new_empty(sizes)


def _row_sum_setup(ctx: Any, inputs: tuple[Tensor, list[int], bool], output: Tensor) -> None:
    x, dim, _ = inputs
    ctx.shape, ctx.dim = x.shape, _reduced(x, dim)


@row_sum.gradient(_row_sum_setup)
def _row_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept = [1 if i in ctx.dim else s for i, s in enumerate(ctx.shape)]
    return grad.reshape(kept).expand(ctx.shape), None, None


@operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.ROWS)
def row_softmax(x: Tensor) -> Tensor:
    """x: [..., N] → exp(x - max) / sum over the last dimension, in x.dtype."""
    return torch.softmax(x.double(), dim=-1)


def _save_output(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


@row_softmax.gradient(_save_output)
def _softmax_backward(ctx: Any, grad: Tensor) -> Tensor:
    y, g = ctx.saved_tensors[0].float(), grad.float()
    return (y * (g - (g * y).sum(-1, keepdim=True))).to(grad.dtype)


@operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.ROWS)
def row_log_softmax(x: Tensor) -> Tensor:
    """x: [..., N] → (x - max) - log(sum of exp(x - max)), in x.dtype."""
    return torch.log_softmax(x.double(), dim=-1)


@row_softmax.fake
@row_log_softmax.fake
def _softmax_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@row_log_softmax.gradient(_save_output)
def _log_softmax_backward(ctx: Any, grad: Tensor) -> Tensor:
    y, g = ctx.saved_tensors[0].float(), grad.float()
    return (g - y.exp() * g.sum(-1, keepdim=True)).to(grad.dtype)
