"""The end of decode attention: the states of a sequence's splits are folded in index order."""

import triton
import triton.language as tl

from llm42c.codegen.triton.kernels.attention_parts import finish, fold

KV_HEADS = tl.constexpr(8)
GROUP = tl.constexpr(4)  # query heads of one KV head
HEAD_DIM = tl.constexpr(128)
DIM = tl.constexpr(128)  # the power of two from HEAD_DIM
DECODE_ROWS = tl.constexpr(16)  # rows of the decode tile; a row is a (token, query head) of one KV head
DECODE_TOKENS = tl.constexpr(4)  # a sequence with at most as many is split over its keys


@triton.jit(do_not_specialize=["cu_seqlens_ptr"])
def attention_combine(
    partial_ptr, stats_ptr, sinks_ptr, out_ptr, cu_seqlens_ptr, plan_ptr, out_stride_t,
):  # fmt: skip
    """Program (sequence, KV head). partial: [slots, Hkv, rows, D], stats: [slots, Hkv, rows, 2]."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    slot = tl.load(plan_ptr + sequence * 2)
    splits = tl.load(plan_ptr + sequence * 2 + 1)
    if splits > 1:
        q_begin = tl.load(cu_seqlens_ptr + sequence)
        q_len = tl.load(cu_seqlens_ptr + sequence + 1) - q_begin
        row = tl.arange(0, DECODE_ROWS)
        token = row // GROUP
        head = kv_head * GROUP + row % GROUP
        live = (row < DECODE_TOKENS * GROUP) & (token < q_len)
        dim = tl.arange(0, DIM)
        held = live[:, None] & (dim < HEAD_DIM)[None, :]
        total_max = tl.full([DECODE_ROWS], float("-inf"), tl.float32)
        total_sum = tl.zeros([DECODE_ROWS], tl.float32)
        total = tl.zeros([DECODE_ROWS, DIM], tl.float32)
        for i in tl.range(0, splits):
            line = ((slot + i).to(tl.int64) * KV_HEADS + kv_head) * DECODE_ROWS + row
            row_max = tl.load(stats_ptr + line * 2, mask=live, other=float("-inf"))
            row_sum = tl.load(stats_ptr + line * 2 + 1, mask=live, other=0.0)
            acc = tl.load(partial_ptr + line[:, None] * HEAD_DIM + dim[None, :], mask=held, other=0.0)
            total_max, total_sum, total = fold(total_max, total_sum, total, row_max, row_sum, acc)
        result = finish(total_max, total_sum, total, sinks_ptr, head)
        at = (q_begin + token).to(tl.int64) * out_stride_t + head * HEAD_DIM
        tl.store(out_ptr + at[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=held)
