"""A tile of a matrix product with one expert's weight."""

import triton
import triton.language as tl

ROWS = tl.constexpr(64)
COLUMNS = tl.constexpr(64)
STEP = tl.constexpr(64)
HAS_BIAS = tl.constexpr(False)


@triton.jit
def grouped_linear(
    x_ptr, w_ptr, bias_ptr, y_ptr, order_ptr, tile_expert_ptr, tile_first_ptr, expert_end_ptr,
    experts, n, k, x_stride, w_stride_e, w_stride_n, w_stride_k,
):  # fmt: skip
    """y[i] = x[i] w[group[i]]^T + bias[group[i]]. x: [R, K], y: [R, N].

    Program (tile of columns, tile of rows). order: rows by expert. Rows whose expert does not exist
    stand last, and become NaN.
    """
    expert = tl.load(tile_expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert <= experts:
        at = tl.load(tile_first_ptr + tl.program_id(1)) + tl.arange(0, ROWS)
        there = at < tl.load(expert_end_ptr + expert)
        row = tl.load(order_ptr + at, mask=there, other=0).to(tl.int64)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = column < n
        y_at = y_ptr + row[:, None] * n + column[None, :]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        if expert < experts:
            step = tl.arange(0, STEP)
            x_at = x_ptr + row[:, None] * x_stride + step[None, :]
            w_row = w_ptr + expert * w_stride_e + column.to(tl.int64) * w_stride_n
            for start in tl.range(0, k, STEP):
                held = start + step < k
                x = tl.load(x_at + start, mask=there[:, None] & held[None, :], other=0.0)  # [M, K]
                w_at = w_row[None, :] + (start + step).to(tl.int64)[:, None] * w_stride_k
                w = tl.load(w_at, mask=held[:, None] & wanted[None, :], other=0.0)  # [K, N]
                acc = tl.dot(x, w, acc, input_precision="ieee")
            if HAS_BIAS:
                bias = tl.load(bias_ptr + expert * n + column, mask=wanted, other=0.0)
                acc = acc + bias.to(tl.float32)[None, :]
        else:
            acc += float("nan")
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=there[:, None] & wanted[None, :])
