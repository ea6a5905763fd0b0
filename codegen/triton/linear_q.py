"""Products with quantised weights on a GPU, with the order of the CPU: integers exactly, then one chain.

Neither tiles nor the device's generation show in the bits, since no matrix instruction adds floating-point
numbers. A launch computes the columns of one weight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm42c.codegen import quant
from llm42c.codegen.device import Device
from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.silu_mul import silu_mul
from llm42c.codegen.triton.source import module

if TYPE_CHECKING:
    from llm42c.codegen.triton.catalog import Kernel

COLUMNS = 64


@dataclass(frozen=True)
class QuantSpec:
    """One kernel: a format, what is added to the product, and the rows of a tile, which change no bit."""

    format: str
    bias: bool = False
    residual: bool = False
    rows: int = 16


@functools.cache
def emit(spec: QuantSpec) -> str:
    """The file of one specialisation; its kernel is ``linear_q``."""
    form = quant.format_of(spec.format)
    outer, inner = 1 + form.has_minimum, form.inner_dtype is not None
    integers = quant.COLUMNS * form.block * form.bits // 8
    decided = {
        "EIGHT": form.bits == 8, "ONE": form.bits == 5, "TWO": form.bits == 6, "INNER": inner,
        "HALVES": form.group < quant.STEP, "HAS_MIN": form.has_minimum, "HAS_BIAS": spec.bias,
        "HAS_RESIDUAL": spec.residual,
    }  # fmt: skip
    constants = {
        "ROWS": spec.rows, "COLUMNS": COLUMNS, "BLOCK": form.block, "BYTES": form.panel_bytes,
        "GROUP": form.group, "OFFSET": form.offset, "OUTER": outer, "SCALE_BYTES": form.outer_dtype.itemsize,
        "HEADER": form.panel_bytes - integers, "STEP_BYTES": integers * quant.STEP // form.block,
    }  # fmt: skip
    text = fold("linear_q", "linear_q", decided)
    return module("Product with quantised weights", f"{spec.format}, M {spec.rows}", constants, text)


@implements("linear_q", "cuda", kernels=lambda device: kernels(device))
def linear_q(
    x: Tensor,
    packed: Sequence[Tensor],
    formats: str,
    sizes: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    gated: bool,
) -> Tensor:
    """``llm42::linear_q``. x: [..., K] → [..., N]."""
    k, n = x.shape[-1], sum(sizes)
    rows = kernel.aligned(x.reshape(-1, k))
    added = None if residual is None else residual.reshape(-1, n)
    y = torch.empty(len(rows), n, dtype=x.dtype, device=x.device)
    first = 0
    for weight, name, size in zip(packed, formats.split(","), sizes, strict=True):
        if len(rows) and size:
            spec = QuantSpec(name, bias is not None, added is not None, 16 if len(rows) <= 16 else 32)
            fn = kernel.load("linear_q", emit(spec), device_of(x.device))
            scales = weight.view(quant.format_of(name).outer_dtype)
            fn[(-(-size // COLUMNS), -(-len(rows) // spec.rows))](
                rows, weight, scales, y if bias is None else bias, y if added is None else added, y,
                len(rows), size, k, first, rows.stride(0), n if added is None else added.stride(0), n,
                num_warps=4, num_stages=2, **kernel.OPTIONS,
            )  # fmt: skip
        first += size
    if gated:
        y = silu_mul(y)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@implements("embedding_q", "cuda")
def embedding_q(ids: Tensor, packed: Tensor, format: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """``llm42::embedding_q``: the panels of the rows that are asked for, by torch."""
    flat = ids.reshape(-1).long()
    panels = quant.unpack(packed[flat // quant.COLUMNS], format, len(flat) * quant.COLUMNS)
    row = torch.arange(len(flat), device=flat.device) * quant.COLUMNS + flat % quant.COLUMNS
    return quant.dequantise(panels.rows(row), format).to(dtype).view(*ids.shape, k)


def kernels(device: Device) -> Iterator[Kernel]:
    """A kernel of every way in which formats differ."""
    from llm42c.codegen.triton.catalog import Kernel

    for name in ("q8_0", "q4_0", "q5_1", "q4_k", "q6_k", "i4_128"):
        for rows in (16, 32):
            scale = "*fp32" if quant.format_of(name).scales == "float" else "*fp16"
            source = emit(QuantSpec(name, rows=rows))
            types = {"w_ptr": "*u8", "scale_ptr": scale}
            yield Kernel(f"linear_q/{name}/m{rows}", "linear_q", source, "bfloat16", types=types)
