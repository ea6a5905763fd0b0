"""``silu(gate) * up`` of gated MLPs, with the roundings of eager PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.ops.registry import Operator


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def silu_mul_reference(x: Tensor) -> Tensor:
    """In fp64, except that silu(gate) is rounded to ``x.dtype``; the product is not rounded."""
    gate, up = x.double().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate)).to(x.dtype).double() * up


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    gate, up = ctx.saved_tensors[0].float().chunk(2, dim=-1)
    g = grad.float()
    s = torch.sigmoid(gate)
    d_gate = g * up * s * (1 + gate * (1 - s))
    return torch.cat((d_gate, g * gate * s), dim=-1).to(grad.dtype)


# x: [..., 2I] = gate | up → [..., I]. silu is computed in fp32 and rounded to x.dtype, then multiplied by
# up and rounded again.
OP = Operator(
    schema="silu_mul(Tensor x) -> Tensor",
    fake=_fake,
    reference=silu_mul_reference,
    reduction="none",
    backward=_backward,
    setup_context=_setup,
)
