"""Matrix products with one order of summation for any number of rows.

``y[m, n] = Σ_k x[m, k] · w[n, k]`` is one chain of fused multiply-adds in fp32, ``acc = fma(x, w, acc)``
from ``acc = 0`` over k ascending; a bias is then added in fp32 and the result rounded to ``x.dtype`` once.
Every output element has its own chain, so its bits depend on its own row and column alone: not on the
number of rows, the row's position, threads, tiles or instruction set.

The packed form streams a weight from memory in the order in which it is used; it is made once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm42c.codegen.ops import activation
from llm42c.codegen.ops.registry import Operator

PANEL = 48
"""Columns of a packed panel (``gemm_lanes.h``)."""

_ONE_CHAIN = "one fp32 FMA chain over k ascending for each output element"


def _panels(n: int) -> int:
    return (n + PANEL - 1) // PANEL


def _linear_pack_fake(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return weight.new_empty(_panels(n), k, PANEL)


def _linear_pack_reference(weight: Tensor) -> Tensor:
    """The panels with columns in natural order; the operator may order them differently within 16."""
    n, k = weight.shape
    padded = weight.new_zeros(_panels(n) * PANEL, k)
    padded[:n] = weight
    return padded.view(_panels(n), PANEL, k).transpose(1, 2).contiguous()


def _linear_unpack_fake(packed: Tensor, n: int, k: int) -> Tensor:
    return packed.new_empty(n, k)


def _linear_unpack_reference(packed: Tensor, n: int, k: int) -> Tensor:
    return packed.transpose(1, 2).reshape(-1, k)[:n].contiguous()


def _linear_fake(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _linear_dense_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_silu_mul_fake(x: Tensor, packed: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _linear_add_fake(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _linear_dense_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In fp64, not rounded to ``x.dtype``."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def _linear_reference(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    weight = UNPACK.overload(packed, n, x.shape[-1])
    return _linear_dense_reference(x, weight, bias)


def _linear_silu_mul_reference(x: Tensor, packed: Tensor, n: int) -> Tensor:
    merged = _linear_reference(x, packed, None, 2 * n).to(x.dtype)
    return activation.silu_mul_reference(merged)


def _linear_add_reference(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int) -> Tensor:
    y = _linear_reference(x, packed, bias, n).to(x.dtype)
    return residual.double() + y.double()


def _linear_dense_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


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


# weight: [N, K] (any strides) → packed: [ceil(N / PANEL), K, PANEL] of the same dtype. The order inside a
# panel belongs to the compiled library: a packed weight is for this process, not for a file.
PACK = Operator(
    schema="linear_pack(Tensor weight) -> Tensor",
    fake=_linear_pack_fake,
    reference=_linear_pack_reference,
    reduction="none",
)

# The exact inverse: packed → [N, K].
UNPACK = Operator(
    schema="linear_unpack(Tensor packed, int n, int k) -> Tensor",
    fake=_linear_unpack_fake,
    reference=_linear_unpack_reference,
    reduction="none",
)

# x: [..., K], packed of [N, K], bias: [N], one dtype (fp32, bf16, fp16) → [..., N].
LINEAR = Operator(
    schema="linear(Tensor x, Tensor packed, Tensor? bias, int n) -> Tensor",
    fake=_linear_fake,
    reference=_linear_reference,
    reduction=_ONE_CHAIN,
)

# As linear, bit for bit, on an ordinary weight [N, K] at any strides.
DENSE = Operator(
    schema="linear_dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_linear_dense_fake,
    reference=_linear_dense_reference,
    reduction=_ONE_CHAIN,
    backward=_linear_dense_backward,
    setup_context=_linear_dense_setup,
)

# packed of merged gate and up rows [2N, K] → silu(gate) * up: [..., N], bit for bit linear, then silu_mul.
SILU_MUL = Operator(
    schema="linear_silu_mul(Tensor x, Tensor packed, int n) -> Tensor",
    fake=_linear_silu_mul_fake,
    reference=_linear_silu_mul_reference,
    reduction=_ONE_CHAIN,
)

# residual: [..., N] → residual + linear(x, packed, bias), bit for bit the two operators.
ADD = Operator(
    schema="linear_add(Tensor x, Tensor packed, Tensor? bias, Tensor residual, int n) -> Tensor",
    fake=_linear_add_fake,
    reference=_linear_add_reference,
    reduction=_ONE_CHAIN,
)

OPERATORS = (PACK, UNPACK, LINEAR, DENSE, SILU_MUL, ADD)
