"""Sums, softmax and log-softmax of rows in one fixed order.

They replace ``sum``, ``mean``, ``softmax`` and ``log_softmax`` where a compiler or library is free to
choose the order by the shape. All accumulate in fp32 in sixteen lanes (see ``norm.py``) and round once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.examples import ROWS, WIDTH, Numbers
from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.order import LANES, TREE


def _reduced(x: Tensor, dim: list[int]) -> list[int]:
    """The reduced dimensions, ascending; an empty list means all, as in ``torch.sum``."""
    return sorted(d % x.dim() for d in dim) if dim else list(range(x.dim()))


def _row_sum_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    x = r(ROWS, WIDTH)
    yield x, [-1], True
    yield x, [], False


@operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.REDUCED, examples=_row_sum_examples)
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


@row_sum.simulator(LANES)
def _row_sum_simulated(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    reduced = _reduced(x, dim)
    kept = [d for d in range(x.dim()) if d not in reduced]
    rows = x.permute(*kept, *reduced).reshape(*(x.shape[d] for d in kept), -1)
    return simulate.lane_sum(rows).to(x.dtype).reshape(_row_sum_fake(x, dim, keepdim).shape)


def _row_sum_setup(ctx: Any, inputs: tuple[Tensor, list[int], bool], output: Tensor) -> None:
    x, dim, _ = inputs
    ctx.shape, ctx.dim = x.shape, _reduced(x, dim)


@row_sum.gradient(_row_sum_setup)
def _row_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept = [1 if i in ctx.dim else s for i, s in enumerate(ctx.shape)]
    return grad.reshape(kept).expand(ctx.shape), None, None


# Numbers that stand behind those of the row operators in norm.py, activation.py and rotary.py.
_BEFORE = 2 * (ROWS + 1) * WIDTH + 2 * ROWS * WIDTH + ROWS * 11 * 64


def _softmax_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield (r.skip(_BEFORE)(ROWS, WIDTH, scale=9.0),)


@operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.ROWS, examples=_softmax_examples)
def row_softmax(x: Tensor) -> Tensor:
    """x: [..., N] → exp(x - max) / sum over the last dimension, in x.dtype."""
    return torch.softmax(x.double(), dim=-1)


def _exponentials(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x - max, their exponentials, the sum of those)."""
    shifted = x.float() - x.float().amax(-1, keepdim=True)
    e = simulate.exp_nonpositive(shifted)
    return shifted, e, simulate.lane_sum(e)


@row_softmax.simulator(LANES)
def _softmax_simulated(x: Tensor) -> Tensor:
    _, e, total = _exponentials(x)
    return simulate.div(e, total).to(x.dtype)


def _save_output(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


@row_softmax.gradient(_save_output)
def _softmax_backward(ctx: Any, grad: Tensor) -> Tensor:
    y, g = ctx.saved_tensors[0].float(), grad.float()
    return (y * (g - (g * y).sum(-1, keepdim=True))).to(grad.dtype)


def _log_softmax_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield (r.skip(_BEFORE + ROWS * WIDTH)(ROWS, WIDTH, scale=9.0),)


@operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.ROWS, examples=_log_softmax_examples)
def row_log_softmax(x: Tensor) -> Tensor:
    """x: [..., N] → (x - max) - log(sum of exp(x - max)), in x.dtype."""
    return torch.log_softmax(x.double(), dim=-1)


@row_log_softmax.simulator(LANES)
def _log_softmax_simulated(x: Tensor) -> Tensor:
    shifted, _, total = _exponentials(x)
    return (shifted - simulate.log(total)).to(x.dtype)


@row_softmax.fake
@row_log_softmax.fake
def _softmax_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@row_log_softmax.gradient(_save_output)
def _log_softmax_backward(ctx: Any, grad: Tensor) -> Tensor:
    y, g = ctx.saved_tensors[0].float(), grad.float()
    return (g - y.exp() * g.sum(-1, keepdim=True)).to(grad.dtype)
