"""All-reduce, residual addition and RMSNorm over symmetric memory."""

import triton
import triton.language as tl

SIZE = tl.constexpr(4096)
WIDTH = tl.constexpr(4096)  # the power of two from SIZE
WORDS = tl.constexpr(512)  # the power of two from SIZE / 8
WORLD = tl.constexpr(8)
ELEMENT = tl.bfloat16

FORM = tl.constexpr("two")  # or "one", "shard", "sum"
HAS_WEIGHT = tl.constexpr(True)
CAST_FIRST = tl.constexpr(True)  # round before the weight, as Llama does
# Without meetings, the parts before and after the inner meeting are launched rank by rank.
MEETS = tl.constexpr(True)
FIRST_PART = tl.constexpr(True)
SECOND_PART = tl.constexpr(True)


@triton.jit
def meet(signals, rank):
    """Programs of this number on all ranks wait for each other; what they wrote before is seen after."""
    tl.debug_barrier()
    slot = tl.program_id(0) * WORLD
    pads = signals.to(tl.pointer_type(tl.int64))
    for peer in tl.static_range(WORLD):
        flag = tl.load(pads + peer).to(tl.pointer_type(tl.int32)) + slot + rank
        old = tl.atomic_cas(flag, 0, 1, sem="release", scope="sys")
        while old != 0:
            old = tl.atomic_cas(flag, 0, 1, sem="release", scope="sys")
    for peer in tl.static_range(WORLD):
        flag = tl.load(pads + rank).to(tl.pointer_type(tl.int32)) + slot + peer
        old = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")
        while old != 1:
            old = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def row_of(buffers, peer, row):
    """Address of a row [H] in the buffer of a rank."""
    table = buffers.to(tl.pointer_type(tl.int64))
    return tl.load(table + peer).to(tl.pointer_type(ELEMENT)) + tl.cast(row, tl.int64) * SIZE


@triton.jit
def add_ranks(buffers, row):
    """The sum of a row over the ranks, ascending, in fp32, rounded once. → [WIDTH]"""
    i = tl.arange(0, WIDTH)
    total = tl.load(row_of(buffers, 0, row) + i, mask=i < SIZE, other=0.0).to(tl.float32)
    for peer in tl.static_range(1, WORLD):
        total += tl.load(row_of(buffers, peer, row) + i, mask=i < SIZE, other=0.0).to(tl.float32)
    return total.to(ELEMENT)


@triton.jit
def norm(x, residual_row, total_row, weight_ptr, eps, offset):
    """RMSNorm of residual + x; the sum goes to total_row. x: [WIDTH] → [WIDTH]"""
    i = tl.arange(0, WIDTH)
    held = i < SIZE
    residual = tl.load(residual_row + i, mask=held, other=0.0)
    x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
    tl.store(total_row + i, x, mask=held)
    wide = x.to(tl.float32)
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
    return y.to(x.dtype)


@triton.jit
def all_reduce_norm(
    buffers, signals, residual_ptr, weight_ptr, y_ptr, total_ptr, rows, residual_stride, eps, offset, rank
):
    """RMSNorm of residual + the sum over the ranks. y: [R, H]."""
    i = tl.arange(0, WIDTH)
    held = i < SIZE
    number = tl.program_id(0)
    programs = tl.num_programs(0)
    if MEETS:
        meet(signals, rank)
    if FORM == "one":
        for row in range(number, rows, programs):
            at = tl.cast(row, tl.int64)
            x = add_ranks(buffers, row)
            y = norm(x, residual_ptr + at * residual_stride, total_ptr + at * SIZE, weight_ptr, eps, offset)
            tl.store(y_ptr + at * SIZE + i, y, mask=held)
    else:
        chunk = tl.cdiv(rows, WORLD)
        if FIRST_PART:
            for k in range(number, tl.minimum(chunk, rows - rank * chunk), programs):
                row = rank * chunk + k
                if FORM == "shard":
                    at = tl.cast(k, tl.int64)
                    x = add_ranks(buffers, row)
                    y = norm(x, residual_ptr + at * residual_stride, total_ptr + at * SIZE, weight_ptr, eps, offset)  # fmt: skip
                    tl.store(row_of(buffers, rank, row) + i, y, mask=held)
                else:
                    tl.store(row_of(buffers, rank, row) + i, add_ranks(buffers, row), mask=held)
        if MEETS and SECOND_PART:
            meet(signals, rank)
        if SECOND_PART:
            for peer in tl.static_range(WORLD):
                for k in range(number, tl.minimum(chunk, rows - peer * chunk), programs):
                    row = peer * chunk + k
                    at = tl.cast(row, tl.int64)
                    x = tl.load(row_of(buffers, peer, row) + i, mask=held, other=0.0)
                    if FORM == "two":
                        x = norm(x, residual_ptr + at * residual_stride, total_ptr + at * SIZE, weight_ptr, eps, offset)  # fmt: skip
                    tl.store(y_ptr + at * SIZE + i, x, mask=held)
    if MEETS and SECOND_PART:
        meet(signals, rank)


@triton.jit
def multimem_sum(multicast, signals, rows, rank):
    """The sum over the ranks in the order of the switch, in place in every rank's buffer. Own rows."""
    word = tl.arange(0, WORDS)
    held = (word < SIZE // 8).to(tl.int32)
    chunk = tl.cdiv(rows, WORLD)
    meet(signals, rank)
    for k in range(tl.program_id(0), tl.minimum(chunk, rows - rank * chunk), tl.num_programs(0)):
        at = multicast + (tl.cast(rank * chunk + k, tl.int64) * SIZE + word * 8) * 2
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $5, 0;"
            " @p multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {$0, $1, $2, $3}, [$4]; }",
            "=r,=r,=r,=r,l,r", [at, held], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False, pack=1,
        )  # fmt: skip
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $6, 0;"
            " @p multimem.st.relaxed.sys.global.v4.bf16x2 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0; }",
            "=r,l,r,r,r,r,r", [at, a, b, c, d, held], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    meet(signals, rank)
