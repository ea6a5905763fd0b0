"""silu(gate) * up, rounded after silu and after the product."""

import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)


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
