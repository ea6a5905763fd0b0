"""Rotary position embedding on a GPU: pointwise, with the roundings of the eager operations."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import target_of
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import power_of_two

_KERNEL = '''
@triton.jit
def rotary(x_ptr, cos_ptr, sin_ptr, y_ptr, heads, x_stride_t, x_stride_h, cos_stride, sin_stride):
    """x: [T, H, D], cos, sin: [T, R] → x * cos + rotate_half(x) * sin. Program (token, head)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, WIDTH)
    held = i < HEAD_DIM
    turned = i < ROTARY_DIM
    partner = tl.where(i < ROTARY_DIM // 2, i + ROTARY_DIM // 2, i - ROTARY_DIM // 2)
    at = x_ptr + token * x_stride_t + head * x_stride_h
    x = tl.load(at + i, mask=held, other=0.0)
    other = tl.load(at + partner, mask=turned, other=0.0).to(tl.float32)
    other = tl.where(i < ROTARY_DIM // 2, -other, other)
    cos = tl.load(cos_ptr + token * cos_stride + i, mask=turned, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_stride + i, mask=turned, other=0.0).to(tl.float32)
    a = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    b = (other * sin).to(x.dtype).to(tl.float32)
    y = tl.where(turned, (a + b).to(x.dtype), x)
    tl.store(y_ptr + (token * heads + head) * HEAD_DIM + i, y, mask=held)
'''


@functools.cache
def emit(head_dim: int, rotary_dim: int) -> str:
    """The file of one specialisation; its kernel is ``rotary``."""
    constants = {"HEAD_DIM": head_dim, "ROTARY_DIM": rotary_dim, "WIDTH": power_of_two(head_dim)}
    return module("Rotary position embedding", f"{rotary_dim} of {head_dim} dimensions", constants, _KERNEL)


@implements("rotary", "cuda")
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``llm42::rotary``. x: [T, H, D], cos, sin: [T, R]."""
    tokens, heads, dim = x.shape
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos.to(x.dtype), sin.to(x.dtype)))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        fn = kernel.load("rotary", emit(dim, cos.shape[-1]), target_of(x.device))
        strides = (x.stride(0), x.stride(1), cos.stride(0), sin.stride(0))
        fn[(tokens, heads)](x, cos, sin, y, heads, *strides, num_warps=1, **kernel.OPTIONS)
    return y
