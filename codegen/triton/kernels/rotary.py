"""Rotary position embedding of a head; what stands behind the first R dimensions stays."""

import triton
import triton.language as tl

HEAD_DIM = tl.constexpr(128)
ROTARY_DIM = tl.constexpr(128)
WIDTH = tl.constexpr(128)  # the power of two from HEAD_DIM


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
