"""Logits of tokens that may come, and minus infinity for the others."""

import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)


@triton.jit
def apply_token_mask(x_ptr, mask_ptr, y_ptr, size, words):
    """x: [R, V], mask: [R, words] int32 → y: [R, V]. Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = i < size
    word = tl.load(mask_ptr + row * words + i // 32, mask=held)
    x = tl.load(x_ptr + row * size + i, mask=held)
    kept = (word >> (i % 32)) & 1
    nothing = tl.full((BLOCK,), -float("inf"), tl.float32).to(x.dtype)
    tl.store(y_ptr + row * size + i, tl.where(kept == 1, x, nothing), mask=held)
