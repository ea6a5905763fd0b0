"""Running sums and products of rows on a GPU: a program takes some rows and walks along them.

Each row is one fp32 chain, element after element, as on a CPU: a row's bits do not depend on the other rows,
nor a position's on what stands behind it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module

ROWS = 64


@functools.cache
def emit(name: str) -> str:
    """The file of ``running_sum`` or ``running_product``; its kernel has that name."""
    text = fold("running", "running", {"PRODUCT": name == "running_product"}, spelled={"running": name})
    return module(f"{name} along the last dimension", f"{ROWS} rows a program", {"ROWS": ROWS}, text)


def _running(name: str, x: Tensor, dim: int) -> Tensor:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{name}: expected dim in [{-x.dim()}, {x.dim() - 1}], got {dim}")
    moved = x.movedim(dim, -1)
    y = torch.empty_like(moved, memory_format=torch.contiguous_format)
    if y.numel():
        rows = kernel.aligned(moved.reshape(-1, moved.shape[-1]).contiguous())
        fn = kernel.load(name, emit(name), device_of(x.device))
        fn[(-(-len(rows) // ROWS),)](rows, y, len(rows), rows.shape[1], num_warps=2, **kernel.OPTIONS)
    return y.movedim(-1, dim).contiguous()


@implements("running_sum", "cuda")
def running_sum(x: Tensor, dim: int) -> Tensor:
    """``llm42::running_sum``."""
    return _running("running_sum", x, dim)


@implements("running_product", "cuda")
def running_product(x: Tensor, dim: int) -> Tensor:
    """``llm42::running_product``."""
    return _running("running_product", x, dim)
