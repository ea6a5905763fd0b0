"""Matrix product with one order over k.

Emitted by llm42 for bf16, M 64.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(64)
COLUMNS = tl.constexpr(64)
STEP = tl.constexpr(64)
HAS_BIAS = tl.constexpr(False)


@triton.jit(do_not_specialize=["m"])
def linear(x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, x_stride, y_stride):
    """y = x w^T + bias. x: [M, K], y: [M, N]; w: [N / COLUMNS, K, COLUMNS]. Program (columns, rows)."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < m
    wanted = column < n
    step = tl.arange(0, STEP)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_stride + step[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, k, STEP):
        held = start + step < k
        x = tl.load(x_at + start, mask=there[:, None] & held[None, :], other=0.0)  # [M, K]
        panel = w_ptr + tl.program_id(0).to(tl.int64) * k * COLUMNS
        w_at = panel + (start + step)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        w = tl.load(w_at, mask=held[:, None], other=0.0)  # [K, N]
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc = acc + tl.load(bias_ptr + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + row.to(tl.int64)[:, None] * y_stride + column[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=there[:, None] & wanted[None, :])
