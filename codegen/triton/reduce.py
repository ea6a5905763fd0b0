"""Sums, softmax and log-softmax of rows on a GPU: one program a row, blocks of columns in ascending order.

A block's elements are added into as many fp32 lanes (element i in lane i % BLOCK, ascending), and the lanes
by a tree; both follow from the row's length alone, so a row's bits do not depend on the other rows.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import power_of_two

LARGEST_BLOCK = 4096


def block(size: int) -> int:
    """Lanes for rows of ``size``."""
    return min(LARGEST_BLOCK, max(128, power_of_two(max(size, 1))))


@functools.cache
def emit(name: str, lanes: int) -> str:
    """The file of ``row_sum``, ``row_softmax`` or ``row_log_softmax``; its kernel has that name."""
    if name == "row_sum":
        text = fold("reduce", "row_sum")
    else:
        text = fold(
            "reduce", "row_softmax", {"LOG": name == "row_log_softmax"}, spelled={"row_softmax": name}
        )
    return module(f"{name} over the last dimension", f"rows in {lanes} lanes", {"BLOCK": lanes}, text)


def _launch(name: str, rows: Tensor, y: Tensor) -> None:
    """rows: [R, N], contiguous."""
    rows, size = kernel.aligned(rows), rows.shape[1]
    fn = kernel.load(name, emit(name, block(size)), device_of(rows.device))
    fn[(len(rows),)](rows, y, size, num_warps=4, **kernel.OPTIONS)


@implements("row_sum", "cuda")
def row_sum(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    """``llm42::row_sum``: over ``dim`` (empty: all), in ascending order of dimensions and of indices."""
    reduced = sorted(d % x.dim() for d in dim) if dim else list(range(x.dim()))
    kept = [d for d in range(x.dim()) if d not in reduced]
    size = math.prod(x.shape[d] for d in reduced)
    rows = x.permute(*kept, *reduced).reshape(-1, size) if size else x.new_empty(0, 0)
    shape = [1 if d in reduced else n for d, n in enumerate(x.shape) if keepdim or d in kept]
    y = x.new_zeros(shape)
    if rows.numel():
        _launch("row_sum", rows.contiguous(), y)
    return y


@implements("row_softmax", "cuda")
def row_softmax(x: Tensor) -> Tensor:
    """``llm42::row_softmax``. x: [..., N]."""
    return _softmax("row_softmax", x)


@implements("row_log_softmax", "cuda")
def row_log_softmax(x: Tensor) -> Tensor:
    """``llm42::row_log_softmax``. x: [..., N]."""
    return _softmax("row_log_softmax", x)


def _softmax(name: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        _launch(name, x.reshape(-1, x.shape[-1]).contiguous(), y)
    return y
