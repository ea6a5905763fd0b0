"""``silu(gate) * up`` on a GPU: pointwise, rounded to the dtype after silu and after the product."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module


@functools.cache
def emit() -> str:
    """The file; its kernel is ``silu_mul``."""
    return module("silu(gate) * up", "any width", {"BLOCK": 1024}, fold("silu_mul", "silu_mul"))


@implements("silu_mul", "cuda")
def silu_mul(x: Tensor) -> Tensor:
    """``llm42::silu_mul``. x: [..., 2 I] → [..., I]."""
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    rows = kernel.aligned(rows)
    y = torch.empty(len(rows), size, dtype=x.dtype, device=x.device)
    if y.numel():
        fn = kernel.load("silu_mul", emit(), device_of(x.device))
        fn[(len(rows), -(-size // 1024))](rows, y, size, rows.stride(0), num_warps=4, **kernel.OPTIONS)
    return y.reshape(*x.shape[:-1], size)
