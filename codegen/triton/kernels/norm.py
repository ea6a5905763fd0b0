"""RMSNorm, RMSNorm of residual + x, and LayerNorm of a row."""

import triton
import triton.language as tl

SIZE = tl.constexpr(4096)
WIDTH = tl.constexpr(4096)  # the power of two from SIZE

HAS_RESIDUAL = tl.constexpr(False)
HAS_WEIGHT = tl.constexpr(True)
HAS_BIAS = tl.constexpr(False)
CENTRED = tl.constexpr(False)  # LayerNorm
CAST_FIRST = tl.constexpr(False)  # round before the weight, as Llama does


@triton.jit
def norm(x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, eps, offset):
    """x: [R, H]. Program: row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    held = i < SIZE
    x = tl.load(x_ptr + row * SIZE + i, mask=held, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * SIZE + i, mask=held, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * SIZE + i, x, mask=held)
    wide = x.to(tl.float32)
    if CENTRED:
        centred = tl.where(held, wide - tl.sum(wide, 0) / SIZE, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / SIZE + eps)
        normed = centred * rstd
    else:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / SIZE + eps)
        normed = wide * rstd
    if not HAS_WEIGHT:
        y = normed
    elif CAST_FIRST:
        weight = tl.load(weight_ptr + i, mask=held, other=0.0).to(tl.float32)
        weight = (weight + offset).to(x.dtype).to(tl.float32)
        y = normed.to(x.dtype).to(tl.float32) * weight
    else:
        weight = tl.load(weight_ptr + i, mask=held, other=0.0).to(tl.float32)
        y = normed * (weight + offset)
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + i, mask=held, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * SIZE + i, y.to(y_ptr.dtype.element_ty), mask=held)
