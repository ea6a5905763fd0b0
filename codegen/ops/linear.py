"""Matrix products with one order of summation for any number of rows.

``y[m, n] = Σ_k x[m, k] · w[n, k]`` is one chain of fused multiply-adds in fp32, ``acc = fma(x, w, acc)``
from ``acc = 0`` over k ascending; a bias is then added in fp32 and the result rounded to ``x.dtype`` once. In
a chain of bf16 numbers, denormals are zero.
Every output element has its own chain, so its bits depend on its own row and column alone: not on the
number of rows, the row's position, threads, tiles or instruction set.

The packed form streams a weight from memory in the order in which it is used; it is made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen import simulate, targets
from llm42c.codegen.examples import OUT, ROWS, WIDTH, Numbers, Packed
from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.ops.activation import silu_mul
from llm42c.codegen.order import CHAIN, COPY, TILES


@operator(orders={"cpu": COPY, "cuda": COPY})
def linear_pack(weight: Tensor) -> Tensor:
    """weight: [N, K] (any strides) → the same numbers as the target's products read them.

    The layout is the target's (``codegen/packing.py``). For references and simulators, which know none, the
    packed weight is the weight.
    """
    return weight.clone(memory_format=torch.contiguous_format)


@linear_pack.fake
def _linear_pack_fake(weight: Tensor) -> Tensor:
    return targets.of(weight.device).packing.linear_pack(weight)


@operator(orders={"cpu": COPY, "cuda": COPY})
def linear_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """The exact inverse: packed of [N, K] → [N, K]."""
    return packed.clone()


@linear_unpack.fake
def _linear_unpack_fake(packed: Tensor, n: int, k: int) -> Tensor:
    return packed.new_empty(n, k)


def _packed_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    x, packed, bias = r(ROWS, WIDTH), Packed(r(OUT, WIDTH)), r(OUT)
    yield x, packed, bias, OUT
    yield x[:1], packed, None, OUT


@operator(
    orders={"cpu": CHAIN, "cuda": TILES},
    tokens=Tokens.ROWS,
    product=lambda x, packed, bias, n: n,
    examples=_packed_examples,
)
def linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """x: [..., K], packed of [N, K], bias: [N], one dtype (fp32, bf16, fp16) → [..., N].

    In fp64, not rounded to ``x.dtype``, of the weight itself.
    """
    return linear_dense.reference(x, packed, bias)


@linear.fake
def _linear_fake(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


@linear.simulator(CHAIN)
def _linear_simulated(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return simulate.linear(x, packed, bias)


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield r(ROWS, WIDTH), r(OUT, WIDTH), r(OUT)


@operator(
    orders={"cpu": CHAIN, "cuda": TILES},
    tokens=Tokens.ROWS,
    product=lambda x, weight, bias: weight.shape[0],
    examples=_examples,
)
def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As linear, bit for bit, on an ordinary weight [N, K] at any strides.

    In fp64, not rounded to ``x.dtype``.
    """
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


@linear_dense.fake
def _linear_dense_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


linear_dense.simulator(CHAIN)(simulate.linear)


def _linear_dense_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


@linear_dense.gradient(_linear_dense_setup)
def _linear_dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Ordinary PyTorch products: the promise about bits covers the forward pass."""
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])  # [M, N]
    d_x = d_weight = d_bias = None
    if ctx.needs_input_grad[0]:
        d_x = (rows @ weight).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        d_weight = rows.T @ x.reshape(-1, x.shape[-1])
    if ctx.has_bias and ctx.needs_input_grad[2]:
        d_bias = rows.sum(0)
    return d_x, d_weight, d_bias


def _silu_mul_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield r(ROWS, WIDTH), Packed(r(OUT, WIDTH)), OUT // 2


@operator(
    orders={"cpu": CHAIN, "cuda": TILES},
    tokens=Tokens.ROWS,
    product=lambda x, packed, n: 2 * n,
    examples=_silu_mul_examples,
)
def linear_silu_mul(x: Tensor, packed: Tensor, n: int) -> Tensor:
    """packed of merged gate and up rows [2N, K] → silu(gate) * up: [..., N].

    Bit for bit ``linear``, then ``silu_mul``.
    """
    merged = linear.reference(x, packed, None, 2 * n).to(x.dtype)
    return silu_mul.reference(merged)


@linear_silu_mul.fake
def _linear_silu_mul_fake(x: Tensor, packed: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


@linear_silu_mul.simulator(CHAIN)
def _linear_silu_mul_simulated(x: Tensor, packed: Tensor, n: int) -> Tensor:
    return simulate.silu_mul(_linear_simulated(x, packed, None, 2 * n))


def _add_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    yield r(ROWS, WIDTH), Packed(r(OUT, WIDTH)), None, r.skip(OUT)(ROWS, OUT), OUT


@operator(
    orders={"cpu": CHAIN, "cuda": TILES},
    tokens=Tokens.ROWS,
    product=lambda x, packed, bias, residual, n: n,
    examples=_add_examples,
)
def linear_add(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int) -> Tensor:
    """residual: [..., N] → residual + linear(x, packed, bias), bit for bit the two operators."""
    y = linear.reference(x, packed, bias, n).to(x.dtype)
    return residual.double() + y.double()


@linear_add.fake
def _linear_add_fake(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


@linear_add.simulator(CHAIN)
def _linear_add_simulated(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int) -> Tensor:
    return (residual.float() + _linear_simulated(x, packed, bias, n).float()).to(x.dtype)
