"""``silu(gate) * up`` of gated MLPs, with the roundings of eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.examples import ROWS, WIDTH, Numbers
from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.order import GPU_POINTWISE, POINTWISE


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield (r.skip(2 * (ROWS + 1) * WIDTH)(ROWS, 2 * WIDTH, scale=9.0),)


@operator(orders={"cpu": POINTWISE, "cuda": GPU_POINTWISE}, tokens=Tokens.ROWS, examples=_examples)
def silu_mul(x: Tensor) -> Tensor:
    """x: [..., 2I] = gate | up → [..., I].

    silu is computed in fp32 and rounded to x.dtype, then multiplied by up and rounded again.

    In fp64, except that silu(gate) is rounded to ``x.dtype``; the product is not rounded.
    """
    gate, up = x.double().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate)).to(x.dtype).double() * up


@silu_mul.fake
def _fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@silu_mul.simulator(POINTWISE)
def _simulated(x: Tensor) -> Tensor:
    return simulate.silu_mul(x)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


@silu_mul.gradient(_setup)
def _backward(ctx: Any, grad: Tensor) -> Tensor:
    gate, up = ctx.saved_tensors[0].float().chunk(2, dim=-1)
    g = grad.float()
    s = torch.sigmoid(gate)
    d_gate = g * up * s * (1 + gate * (1 - s))
    return torch.cat((d_gate, g * gate * s), dim=-1).to(grad.dtype)
