"""``silu(gate) * up`` on a GPU: pointwise, rounded to the dtype after silu and after the product."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import target_of
from llm42c.codegen.triton.source import module

_KERNEL = '''
@triton.jit
def silu_mul(x_ptr, y_ptr, size, stride):
    """x: [R, 2 I] = gate, up → y: [R, I]. Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = i < size
    gate = tl.load(x_ptr + row * stride + i, mask=held)
    up = tl.load(x_ptr + row * stride + size + i, mask=held)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(y_ptr + row * size + i, silu.to(tl.float32) * up.to(tl.float32), mask=held)
'''


@functools.cache
def emit() -> str:
    """The file; its kernel is ``silu_mul``."""
    return module("silu(gate) * up", "any width", {"BLOCK": 1024}, _KERNEL)


@implements("silu_mul", "cuda")
def silu_mul(x: Tensor) -> Tensor:
    """``llm42::silu_mul``. x: [..., 2 I] → [..., I]."""
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    rows = kernel.aligned(rows)
    y = torch.empty(len(rows), size, dtype=x.dtype, device=x.device)
    if y.numel():
        fn = kernel.load("silu_mul", emit(), target_of(x.device))
        fn[(len(rows), -(-size // 1024))](rows, y, size, rows.stride(0), num_warps=4, **kernel.OPTIONS)
    return y.reshape(*x.shape[:-1], size)
