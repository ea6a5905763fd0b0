"""Rotary position embedding on a GPU: pointwise, with the roundings of the eager operations."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import power_of_two


@functools.cache
def emit(head_dim: int, rotary_dim: int) -> str:
    """The file of one specialisation; its kernel is ``rotary``."""
    constants = {"HEAD_DIM": head_dim, "ROTARY_DIM": rotary_dim, "WIDTH": power_of_two(head_dim)}
    return module(
        "Rotary position embedding",
        f"{rotary_dim} of {head_dim} dimensions",
        constants,
        fold("rotary", "rotary"),
    )


@implements("rotary", "cuda")
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``llm42::rotary``. x: [T, H, D], cos, sin: [T, R]."""
    tokens, heads, dim = x.shape
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos.to(x.dtype), sin.to(x.dtype)))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        fn = kernel.load("rotary", emit(dim, cos.shape[-1]), device_of(x.device))
        strides = (x.stride(0), x.stride(1), cos.stride(0), sin.stride(0))
        fn[(tokens, heads)](x, cos, sin, y, heads, *strides, num_warps=1, **kernel.OPTIONS)
    return y
