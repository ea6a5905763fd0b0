"""Systems of equations with a triangular matrix, solved by substitution in one order.

Chunked forms of linear attention (the delta rule) solve one for each chunk. A library blocks such systems by
their size and number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.examples import Numbers
from llm42c.codegen.operator import operator
from llm42c.codegen.order import SUBSTITUTION


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    a, b = 0.25 * r(2, 33, 33).float() + torch.eye(33), r(33, 9).float()
    yield a, b, False, False
    yield a.mT, b, True, True


@operator(orders={"cpu": SUBSTITUTION, "cuda": SUBSTITUTION}, examples=_examples)
def solve_triangular(a: Tensor, b: Tensor, upper: bool, unit: bool) -> Tensor:
    """a: [..., N, N], of which the lower (or upper) triangle is read, with ones on its diagonal if unit; b:
    [..., N, K], fp32; leading dimensions broadcast → x with a x = b. Raises ValueError and TypeError for
    shapes and dtypes that do not fit.

    In fp64, not rounded to ``b.dtype``.
    """
    return torch.linalg.solve_triangular(a.double(), b.double(), upper=upper, unitriangular=unit)


@solve_triangular.fake
def _fake(a: Tensor, b: Tensor, upper: bool, unit: bool) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return b.new_empty(*batch, *b.shape[-2:])


@solve_triangular.simulator(SUBSTITUTION)
def _simulated(a: Tensor, b: Tensor, upper: bool, unit: bool) -> Tensor:
    size = a.shape[-1]
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rest = list(b.expand(*batch, *b.shape[-2:]).unbind(-2))  # of each equation: [..., K]
    known = range(size - 1, -1, -1) if upper else range(size)
    for j in known:
        if not unit:
            rest[j] = simulate.div(rest[j], a[..., j, j, None])
        for i in range(j) if upper else range(j + 1, size):
            rest[i] = rest[i] - a[..., i, j, None] * rest[j]
    return torch.stack(rest, -2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.upper, ctx.unit = inputs
    ctx.save_for_backward(a, b, output)


@solve_triangular.gradient(_setup_context)
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Ordinary PyTorch products beside the operator: the promise about bits covers the forward pass."""
    a, b, x = ctx.saved_tensors
    d_b = torch.ops.llm42.solve_triangular(a.mT, grad, not ctx.upper, ctx.unit)
    d_a = -d_b @ x.mT
    diagonal = 1 if ctx.unit else 0
    d_a = d_a.triu(diagonal) if ctx.upper else d_a.tril(-diagonal)
    return d_a.sum_to_size(a.shape), d_b.sum_to_size(b.shape), None, None


@solve_triangular.implementation("cpu", "cuda")
def _composite(a: Tensor, b: Tensor, upper: bool, unit: bool) -> Tensor:
    """Each unknown, once known, is subtracted from all equations that are left."""
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"solve_triangular: expected a [..., N, N] and b [..., N, K], got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise TypeError(f"solve_triangular: expected float32, got {a.dtype} and {b.dtype}")
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    rest = b.expand(*batch, *b.shape[-2:]).clone(memory_format=torch.contiguous_format)
    size = a.shape[-1]
    for j in reversed(range(size)) if upper else range(size):
        left = slice(0, j) if upper else slice(j + 1, size)
        if not unit:
            rest[..., j, :] = rest[..., j, :] / a[..., j, j, None]
        rest[..., left, :] -= a[..., left, j, None] * rest[..., j, None, :]
    return rest
