"""Matrix products with quantised weights: integer sums, which are exact, folded in one order.

x is quantised too, row by row: 32 values of k are integers of eight bits times one fp32 scale. Within a group
that shares a scale of the weight, the sum of products of integers is exact, so it has no order; the groups'
terms are one chain of fused multiply-adds in fp32. An element's bits depend on its own row and column alone,
and on a GPU are those of a CPU, but for SiLU, whose exponential is another there.

Weights are packed by the target (``codegen/packing.py``). Several stand side by side in one call, each in its
own format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen import quant, simulate, targets
from llm42c.codegen.examples import ROWS, Numbers
from llm42c.codegen.operator import Tokens, operator
from llm42c.codegen.ops.activation import silu_mul
from llm42c.codegen.order import GPU_GROUPS, GROUPS, POINTWISE

_K, _N = 512, 40  # of examples


def example_weight(r: Numbers, n: int, k: int, name: str) -> Tensor:
    """A packed weight [n, k] of any integers and of scales of any sign."""
    form = quant.format_of(name)

    def integers(count: int, bits: int) -> Tensor:
        return ((r(n, count).float() + 1) * 2 ** (bits - 1)).floor().clamp(max=2**bits - 1).to(torch.uint8)

    def outer() -> Tensor:
        return (r(n, k // form.block).float() / 2 ** (form.bits + (8 if form.inner_dtype else 0))).to(
            form.outer_dtype
        )

    inner: list[Tensor | None] = [None, None]
    if form.inner_dtype is not None:
        bits = 6 if form.has_minimum else 8
        inner = [integers(k // form.group, bits).view(form.inner_dtype) for _ in range(1 + form.has_minimum)]
    minimum = outer() if form.has_minimum else None
    values = quant.Values(integers(k, form.bits), outer(), minimum, *inner)
    return targets.of(values.q.device).packing.quantised(values, name)


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    x = r(ROWS, _K)
    for first, second in (
        ("q8_0", "q4_1"),
        ("q4_0", "q5_0"),
        ("q5_1", "q4_k"),
        ("q5_k", "q6_k"),
        ("i4_32", "i4_128"),
    ):
        packed = [example_weight(r, n, _K, name) for n, name in ((_N, first), (_N // 2, second))]
        yield x, packed, f"{first},{second}", [_N, _N // 2], r(_N + _N // 2), r(ROWS, _N + _N // 2), False
        pair = [packed[0], example_weight(r, _N, _K, second)]
        yield x[:1], pair, f"{first},{second}", [_N, _N], None, None, True


def _values(packed: Tensor, format: str, n: int) -> quant.Values:
    return targets.of(packed.device).packing.quantised_values(packed, format, n)


def _weights(packed: Sequence[Tensor], formats: str, sizes: Sequence[int]) -> list[tuple[quant.Values, str]]:
    names = formats.split(",")
    return [(_values(p, f, n), f) for p, f, n in zip(packed, names, sizes, strict=True)]


@operator(
    orders={"cpu": GROUPS, "cuda": GPU_GROUPS},
    tokens=Tokens.ROWS,
    product=lambda x, packed, formats, sizes, bias, residual, gated: sum(sizes),
    examples=_examples,
)
def linear_q(
    x: Tensor,
    packed: Sequence[Tensor],
    formats: str,
    sizes: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """x: [..., K], packed weights of [N_i, K] in the formats "a,b,…", bias: [N], residual: [..., N], all but
    the weights of one dtype (fp32, bf16, fp16) → [..., N], N = Σ N_i.

    The chain, the bias in fp32, one rounding; then ``residual + y``. ``gated``: of two weights of N rows,
    silu(gate) * up as ``silu_mul`` of the rounded products, [..., N].
    In fp64 of x as it is, not rounded to ``x.dtype``.
    """
    weights = [quant.dequantise(values, name) for values, name in _weights(packed, formats, sizes)]
    y = x.double() @ torch.cat(weights).double().T
    if gated:
        return silu_mul.reference(y.to(x.dtype))
    y = y if bias is None else y + bias.double()
    return y if residual is None else residual.double() + y.to(x.dtype).double()


@linear_q.fake
def _linear_q_fake(
    x: Tensor, packed: Sequence[Tensor], formats: str, sizes: Sequence[int], *rest: Any
) -> Tensor:
    gated = rest[-1]
    return x.new_empty(*x.shape[:-1], sizes[0] if gated else sum(sizes))


@linear_q.simulator(GROUPS)
def _linear_q_simulated(
    x: Tensor,
    packed: Sequence[Tensor],
    formats: str,
    sizes: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    y = torch.cat([_chains(x, values, name) for values, name in _weights(packed, formats, sizes)], -1)
    if gated:
        return simulate.silu_mul(y.to(x.dtype))
    y = (y if bias is None else y + bias.float()).to(x.dtype)
    return y if residual is None else (residual.float() + y.float()).to(x.dtype)


def _chains(x: Tensor, values: quant.Values, name: str) -> Tensor:
    """x: [..., K] → [..., N] in fp32."""
    form = quant.format_of(name)
    fold = min(form.group, quant.STEP)
    q_x, scale_x = simulate.integers(x, quant.STEP)  # [..., K], [..., K / STEP]
    q_w = values.q.long() - form.offset
    scale_w, minimum = values.scale(form.group), values.minimum(form.group)
    acc = torch.zeros(*x.shape[:-1], len(q_w))
    for k in range(0, x.shape[-1], fold):
        step, group = k // quant.STEP, k // form.group
        here = slice(k, k + fold)
        total = (q_x[..., None, here] * q_w[:, here]).sum(-1).float()
        acc = simulate.fma(scale_w[:, group] * scale_x[..., step, None], total, acc)
        if minimum is not None:
            sum_x = scale_x[..., step] * q_x[..., here].sum(-1).float()
            acc = simulate.fma(minimum[:, group], sum_x[..., None], acc)
    return acc


def _rows_examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    ids = torch.tensor([[3, _N - 1, 0], [3, 17, 16]])
    for name in quant.FORMATS:
        yield ids, example_weight(r, _N, _K, name), name, _N, _K, r.dtype


@operator(orders={"cpu": POINTWISE, "cuda": POINTWISE}, examples=_rows_examples)
def embedding_q(ids: Tensor, packed: Tensor, format: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """ids: [...] int64 → rows of a packed weight [n, k]: [..., k]; scale · q, plus the minimum, each rounded
    to fp32, then to ``dtype``."""
    return quant.dequantise(_values(packed, format, n), format)[ids].to(dtype)


@embedding_q.fake
def _embedding_q_fake(ids: Tensor, packed: Tensor, format: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(*ids.shape, k, dtype=dtype)


embedding_q.simulator(POINTWISE)(embedding_q.reference)
