"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the half-split form of GPT-NeoX and Llama."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.examples import ROWS, WIDTH, Numbers
from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.order import POINTWISE


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    r.skip(2 * (2 * ROWS + 1) * WIDTH)
    yield r(ROWS, 9, 64), r(ROWS, 64), r(ROWS, 64)


@operator(orders={"cpu": POINTWISE, "cuda": POINTWISE}, tokens=Tokens.ROWS, examples=_examples)
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, H, D], cos and sin: [T, R] of the same dtype, R even, R <= D → [T, H, D], contiguous.

    x * cos + rotate_half(x) * sin on the first R of D, the rest copied. Each of the three operations is
    rounded to x.dtype, as in eager PyTorch. Rows of D that are not contiguous are copied.

    Exactly the eager operations in ``x.dtype``; the operator has the same bits.
    """
    rotary_dim = cos.shape[-1]
    part, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    cos, sin = cos[:, None, :], sin[:, None, :]  # [T, 1, R]
    return torch.cat((part * cos + _rotate_half(part) * sin, rest), dim=-1)


@rotary.fake
def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@rotary.simulator(POINTWISE)
def _simulated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size, dtype = cos.shape[-1], x.dtype
    part, rest = x[..., :size], x[..., size:]
    c, s = cos[:, None, :].float(), sin[:, None, :].float()  # [T, 1, R]
    straight, turned = (part.float() * c).to(dtype), (_rotate_half(part).float() * s).to(dtype)
    return torch.cat(((straight.float() + turned.float()).to(dtype), rest), dim=-1)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@rotary.gradient(_setup)
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, cos, sin = ctx.saved_tensors
    rotary_dim = cos.shape[-1]
    g, rest = grad[..., :rotary_dim], grad[..., rotary_dim:]
    part = x[..., :rotary_dim]
    # rotate_half is orthogonal with rotate_half² = -1, so its transpose is its negative.
    d_x = torch.cat((g * cos[:, None, :] - _rotate_half(g * sin[:, None, :]), rest), dim=-1)
    d_cos = (g * part).sum(1) if ctx.needs_input_grad[1] else None
    d_sin = (g * _rotate_half(part)).sum(1) if ctx.needs_input_grad[2] else None
    return d_x, d_cos, d_sin
