"""The running sum or product of rows: one chain a row."""

import triton
import triton.language as tl

ROWS = tl.constexpr(64)
PRODUCT = tl.constexpr(False)


@triton.jit
def running(x_ptr, y_ptr, rows, size):
    """x: [R, N] → y: [R, N]. Program: ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    if PRODUCT:
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        total = tl.full([ROWS], -0.0, tl.float32)
    for i in range(0, size):
        x = tl.load(x_ptr + row * size + i, mask=there, other=0.0).to(tl.float32)
        if PRODUCT:
            total = total * x
        else:
            total = total + x
        tl.store(y_ptr + row * size + i, total.to(y_ptr.dtype.element_ty), mask=there)
