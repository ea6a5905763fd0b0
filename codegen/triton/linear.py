"""Matrix products on a GPU with one order over k for any number of rows.

A tile's rows do not see each other: every output element is one chain of matrix instructions over k
ascending, never split. Only M of the tile follows the number of rows, in buckets whose tiles are made of
the same instruction (a device where they would not be has one bucket), so a row's bits do not depend on it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from llm42c.codegen.device import Device
from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.packing import PANEL
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import DTYPES


@dataclass(frozen=True)
class LinearSpec:
    """One kernel. ``packed``: panels of ``columns``; else rows of an ordinary [N, K] weight."""

    dtype: str
    packed: bool
    bias: bool
    rows: int
    columns: int
    step: int
    warps: int
    stages: int


def buckets(device: Device) -> tuple[int, ...]:
    """M of the tiles, ascending; all are made of one instruction on this device.

    mma.sync works on 16 rows, wgmma on 64. Blackwell's and AMD's choice of instruction follows the tile, so
    there is one tile.
    """
    if device.kind == "hip" or device.capability >= 100:
        return (64,)
    return (64, 128) if device.capability >= 90 else (16, 32, 64, 128)


def spec_for(device: Device, rows: int, dtype: str, packed: bool, bias: bool) -> LinearSpec:
    """The tile for a number of rows: the only thing that depends on it."""
    if dtype == "float32":  # plain multiply-adds: one tile
        return LinearSpec(dtype, packed, bias, 16, PANEL, 32, 4, 2)
    chosen = next((b for b in buckets(device) if rows <= b), buckets(device)[-1])
    warps = 8 if chosen == 128 else 4
    return LinearSpec(dtype, packed, bias, chosen, PANEL, 64, warps, 2 if device.kind == "hip" else 3)


@functools.cache
def emit(spec: LinearSpec) -> str:
    """The file of one specialisation; its kernel is ``linear``."""
    layout = "[N / COLUMNS, K, COLUMNS]" if spec.packed else "[N, K]"
    doc = f"y = x w^T + bias. x: [M, K], y: [M, N]; w: {layout}. Program (columns, rows)."
    body = fold("linear", "linear", {"PACKED": spec.packed}, doc=doc)
    constants = {"ROWS": spec.rows, "COLUMNS": spec.columns, "STEP": spec.step, "HAS_BIAS": spec.bias}
    return module(
        "Matrix product with one order over k", f"{DTYPES[spec.dtype]}, M {spec.rows}", constants, body
    )


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, n: int, packed: bool) -> Tensor:
    k = x.shape[-1]
    rows = kernel.aligned(x.reshape(-1, k))
    weight = weight.contiguous()
    y = torch.empty(len(rows), n, dtype=x.dtype, device=x.device)
    if y.numel():
        device = device_of(x.device)
        spec = spec_for(device, len(rows), str(x.dtype).removeprefix("torch."), packed, bias is not None)
        fn = kernel.load("linear", emit(spec), device)
        grid = (-(-n // spec.columns), -(-len(rows) // spec.rows))
        fn[grid](
            rows, kernel.aligned(weight), y if bias is None else kernel.aligned(bias), y, len(rows), n, k,
            k if len(rows) == 1 else rows.stride(0), n,
            num_warps=spec.warps, num_stages=spec.stages, **kernel.OPTIONS,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], n)


@implements("linear", "cuda")
def linear(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """``llm42::linear``. x: [..., K] → [..., N]."""
    return _launch(x, packed, bias, n, packed=True)


@implements("linear_dense", "cuda")
def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``llm42::linear_dense``. weight: [N, K]."""
    return _launch(x, weight, bias, weight.shape[0], packed=False)


@implements("linear_silu_mul", "cuda")
def linear_silu_mul(x: Tensor, packed: Tensor, n: int) -> Tensor:
    """``llm42::linear_silu_mul``: the two operators, one after the other."""
    out: Tensor = torch.ops.llm42.silu_mul.default(linear(x, packed, None, 2 * n))
    return out


@implements("linear_add", "cuda")
def linear_add(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, n: int) -> Tensor:
    """``llm42::linear_add``: the product rounded to x.dtype, then added."""
    return residual + linear(x, packed, bias, n)
