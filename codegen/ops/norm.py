"""RMSNorm (arXiv 1910.07467), with and without a residual addition, and LayerNorm (arXiv 1607.06450).

All work on the last dimension, in fp32. A sum over a row: element i goes to lane i % 16 of sixteen
partial sums, in ascending i (squares by fused multiply-add); the lanes are added as the tree
lane i + lane i + 8, then + 4, + 2, + 1.
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


def _over_rows(t: Tensor, like: Tensor) -> Tensor:
    """The gradient of a vector that was broadcast over all rows."""
    return t.reshape(-1, t.shape[-1]).sum(0).to(like.dtype)


def _through_scale(g: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """d x of ``normed = x * rsqrt(mean(x²) + eps)``."""
    return scale * (g - normed * (g * normed).mean(-1, keepdim=True))


def _rms_norm_grads(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    wide, g = x.float(), grad.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
    normed = wide * scale
    if weight is None:
        return _through_scale(g, normed, scale), None
    d_weight = _over_rows(g * normed, weight)
    return _through_scale(g * (weight.float() + ctx.weight_offset), normed, scale), d_weight


def _rms_norm_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    x, weight = r(ROWS, WIDTH), r.skip(ROWS * WIDTH)(WIDTH)
    yield x, weight, 1e-5, 0.0, True
    yield x, weight, 1e-2, 1.0, False


@operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.ROWS, examples=_rms_norm_examples)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool) -> Tensor:
    """x: [..., H], weight: [H] → [..., H].

    scale = 1 / sqrt(mean(x²) + eps). cast_first (Llama): round(x * scale) to x.dtype, times (weight +
    weight_offset) in x.dtype; weight has x's dtype. Otherwise (Gemma, OLMo 2): all in fp32 with one rounding;
    weight has x's dtype or fp32.

    In fp64 without any rounding; ``cast_first`` only says where the operator rounds.
    """
    wide = x.double()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (weight.double() + weight_offset)


@rms_norm.fake
def _rms_norm_fake(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _inverse_root(squares: Tensor, size: int, eps: float) -> Tensor:
    """1 / sqrt(squares / size + eps), four roundings."""
    return simulate.div(1.0, simulate.sqrt(simulate.div(squares, size) + simulate.fp32(eps)))


@rms_norm.simulator(LANES)
def _rms_norm_simulated(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool
) -> Tensor:
    wide = x.float()
    y = wide * _inverse_root(simulate.lane_squares(wide), x.shape[-1], eps)
    if weight is None:
        return y.to(x.dtype)
    factor = weight.float() + simulate.fp32(weight_offset)
    if cast_first:
        y, factor = y.to(x.dtype).float(), factor.to(x.dtype).float()
    return (y * factor).to(x.dtype)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.weight_offset, _ = inputs
    ctx.save_for_backward(x, weight)


@rms_norm.gradient(_rms_norm_setup)
def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    d_x, d_weight = _rms_norm_grads(ctx, grad, x, weight)
    return d_x.to(x.dtype), d_weight, None, None, None


def _add_rms_norm_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield r(ROWS, WIDTH), r(ROWS, WIDTH), r(WIDTH), 1e-5, 0.0, True


@operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.ROWS, examples=_add_rms_norm_examples)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """→ (rms_norm(residual + x), residual + x); the sum is rounded to x.dtype before it is normed."""
    total = residual + x
    return rms_norm.reference(total, weight, eps, weight_offset, cast_first), total


@add_rms_norm.fake
def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


@add_rms_norm.simulator(LANES)
def add_rms_norm_simulated(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    total = (residual.float() + x.float()).to(x.dtype)
    return _rms_norm_simulated(total, weight, eps, weight_offset, cast_first), total


def _add_rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, ctx.weight_offset, _ = inputs
    ctx.save_for_backward(output[1], weight)


@add_rms_norm.gradient(_add_rms_norm_setup)
def _add_rms_norm_backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    d_total, d_weight = _rms_norm_grads(ctx, grad, total, weight)
    d_x = (d_total + grad_total.float()).to(total.dtype)
    return d_x, d_x.clone(), d_weight, None, None, None


def _layer_norm_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield r(ROWS, WIDTH), r.skip(ROWS * WIDTH)(WIDTH), r(WIDTH), 1e-5


@operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.ROWS, examples=_layer_norm_examples)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x: [..., H], weight and bias: [H] of x's dtype or both fp32 → [..., H].

    The mean first, then the mean of the squared deviations; all in fp32 with one rounding.
    """
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.double()
    return y if bias is None else y + bias.double()


@layer_norm.fake
def _layer_norm_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@layer_norm.simulator(LANES)
def _layer_norm_simulated(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide, size = x.float(), x.shape[-1]
    centred = wide - simulate.div(simulate.lane_sum(wide), size)
    y = centred * _inverse_root(simulate.lane_squares(centred), size, eps)
    y = y if weight is None else y * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


@layer_norm.gradient(_layer_norm_setup)
def _layer_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    wide, g = x.float(), grad.float()
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + ctx.eps)
    normed = centred * scale
    inner = g if weight is None else g * weight.float()
    d_x = _through_scale(inner, normed, scale) - scale * inner.mean(-1, keepdim=True)
    d_weight = None if weight is None else _over_rows(g * normed, weight)
    d_bias = None if bias is None else _over_rows(g, bias)
    return d_x.to(x.dtype), d_weight, d_bias, None
