"""row_sum over the last dimension.

Emitted by llm42 for rows in 4096 lanes.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(4096)


@triton.jit
def row_sum(x_ptr, y_ptr, size):
    """x: [R, N] → y: [R]. Program: row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        lanes += tl.load(x_ptr + row * size + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, tl.sum(lanes, 0).to(y_ptr.dtype.element_ty))
