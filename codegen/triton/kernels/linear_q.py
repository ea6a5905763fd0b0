"""A tile of a product with quantised weights: exact sums of integers, then one chain over the groups."""

import triton
import triton.language as tl

ROWS = tl.constexpr(16)
COLUMNS = tl.constexpr(64)
BLOCK = tl.constexpr(32)  # values of k in a block of a panel, and its bytes
BYTES = tl.constexpr(288)
GROUP = tl.constexpr(32)  # values of k that share a scale
OFFSET = tl.constexpr(8)  # what is taken away from integers as they are stored
OUTER = tl.constexpr(1)  # fp16 or fp32 scales of a block and column: one, and one of the minimum
SCALE_BYTES = tl.constexpr(2)  # of such a scale
HEADER = tl.constexpr(32)  # bytes in front of the integers
STEP_BYTES = tl.constexpr(256)  # of 32 values of k
EIGHT = tl.constexpr(False)  # bits of an integer; else four in nibbles, and above them ONE or TWO
ONE = tl.constexpr(False)
TWO = tl.constexpr(False)
INNER = tl.constexpr(False)  # a byte of every group and column is a factor of the scale
HALVES = tl.constexpr(False)  # groups of sixteen, whose inner scales have a sign
HAS_MIN = tl.constexpr(False)
HAS_BIAS = tl.constexpr(False)
HAS_RESIDUAL = tl.constexpr(False)


# What follows the batch and the place among other weights must not select another binary.
@triton.jit(do_not_specialize=["m", "first"])
def linear_q(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, y_ptr, m, n, k, first, x_stride, residual_stride, y_stride
):  # fmt: skip
    """Columns first.. of y [M, ...] = x w^T. x: [M, K]; w: panels of [N, K]. Program (columns, rows).

    scale: the bytes of w as scales. One chain over k ascending for each element.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < m
    wanted = column < n
    lane = column % 16
    step = tl.arange(0, 32)
    unit = step // 4  # four values of k of sixteen columns
    byte = 4 * lane[None, :] + (step % 4)[:, None]  # [32, N]
    panel = (column // 16).to(tl.int64) * (k // BLOCK) * BYTES  # [N]
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_stride + step[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.range(0, k, 32):
        # x as integers of eight bits.
        x = tl.load(x_at + begin, mask=there[:, None], other=0.0).to(tl.float32)  # [M, 32]
        largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        finite = largest < 0x7F800000
        magnitude = largest.to(tl.float32, bitcast=True)
        counts = finite & (magnitude >= 1.504632769052528e-36)  # 2^-119
        inverse = tl.where(counts, tl.div_rn(127.0 + magnitude * 0.0, tl.where(counts, magnitude, 1.0)), 0.0)
        scale_x = tl.where(counts, tl.div_rn(magnitude, 127.0 + magnitude * 0.0), 0.0)
        scale_x = tl.where(finite, scale_x, float("nan"))
        # The sum with 1.5 * 2^23 is rounded to an integer, ties to even.
        q_x = (tl.where(finite[:, None], x, 0.0) * inverse[:, None] + 12582912.0) - 12582912.0
        q_x = q_x.to(tl.int8)
        # Integers of the weight.
        index = begin // BLOCK
        within = begin - index * BLOCK
        block = panel + index * BYTES  # [N]
        w_at = w_ptr + (block + HEADER + within // 32 * STEP_BYTES)[None, :] + byte
        if EIGHT:
            q_w = tl.load(w_at + unit[:, None] * 64, mask=wanted[None, :], other=0).to(tl.int32)
        else:
            q_w = tl.load(w_at + (unit % 4)[:, None] * 64, mask=wanted[None, :], other=0).to(tl.int32)
            q_w = (q_w >> (unit // 4 * 4)[:, None]) & 15
        if ONE:
            above = tl.load(w_at + 256, mask=wanted[None, :], other=0).to(tl.int32)
            q_w = q_w | (((above >> unit[:, None]) & 1) << 4)
        if TWO:
            above = tl.load(w_at + 256 + (unit // 4)[:, None] * 64, mask=wanted[None, :], other=0).to(
                tl.int32
            )
            q_w = q_w | (((above >> (unit % 4 * 2)[:, None]) & 3) << 4)
        q_w = (q_w - OFFSET).to(tl.int8)
        # The groups' terms.
        group = within // GROUP
        outer = scale_ptr + block // SCALE_BYTES + lane
        scale_w = tl.load(outer, mask=wanted, other=0.0).to(tl.float32)
        if HALVES:
            for half in tl.static_range(2):
                inner_at = w_ptr + block + OUTER * 16 * SCALE_BYTES + (group + half) * 16 + lane
                inner = tl.load(inner_at, mask=wanted, other=0).to(tl.int8, bitcast=True).to(tl.float32)
                part = tl.where((step // 16 == half)[None, :], q_x, 0).to(tl.int8)
                total = tl.dot(part, q_w, out_dtype=tl.int32).to(tl.float32)
                acc = tl.fma((scale_w * inner)[None, :] * scale_x[:, None], total, acc)
        else:
            if INNER:
                inner_at = w_ptr + block + OUTER * 16 * SCALE_BYTES + group * 16 + lane
                scale_w = scale_w * tl.load(inner_at, mask=wanted, other=0).to(tl.float32)
            total = tl.dot(q_x, q_w, out_dtype=tl.int32).to(tl.float32)
            acc = tl.fma(scale_w[None, :] * scale_x[:, None], total, acc)
        if HAS_MIN:
            minimum = tl.load(outer + 16, mask=wanted, other=0.0).to(tl.float32)
            if INNER:
                inner_at = w_ptr + block + OUTER * 16 * SCALE_BYTES + (BLOCK // GROUP + group) * 16 + lane
                minimum = 0.0 - minimum * tl.load(inner_at, mask=wanted, other=0).to(tl.float32)
            sum_x = scale_x * tl.sum(q_x.to(tl.int32), 1).to(tl.float32)
            wide = tl.zeros([ROWS, COLUMNS], tl.float32)
            acc = tl.fma(wide + minimum[None, :], wide + sum_x[:, None], acc)
    at = first + column
    if HAS_BIAS:
        acc = acc + tl.load(bias_ptr + at, mask=wanted, other=0.0).to(tl.float32)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    kept = there[:, None] & wanted[None, :]
    if HAS_RESIDUAL:
        residual_at = residual_ptr + row.to(tl.int64)[:, None] * residual_stride + at[None, :]
        residual = tl.load(residual_at, mask=kept, other=0.0).to(tl.float32)
        y = (residual + y.to(tl.float32)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * y_stride + at[None, :], y, mask=kept)
