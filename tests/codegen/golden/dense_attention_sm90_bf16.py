"""Attention in a fixed order.

Emitted by llm42 for heads of 128 in groups of 4, bf16.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(4)
HEAD_DIM = tl.constexpr(128)
DIM = tl.constexpr(128)
ROWS = tl.constexpr(32)
KEYS = tl.constexpr(32)
SPLIT = tl.constexpr(512)
STAGES = tl.constexpr(1)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def fold(left_max, left_sum, left, right_max, right_sum, right):
    """The state over two ranges of keys. max, sum: [M]; left, right: [M, D]."""
    top = tl.maximum(left_max, right_max)
    base = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp2(left_max - base)
    b = tl.exp2(right_max - base)
    total = tl.fma(right, tl.broadcast_to(b[:, None], right.shape), left * a[:, None])
    return top, tl.fma(right_sum, b, left_sum * a), total


@triton.jit
def finish(row_max, row_sum, acc, sinks_ptr, head):
    """Normalise. Adding 0 turns -0 into +0, whose sign depends on how many empty blocks were folded in."""
    return acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None] + 0.0


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    scale, softcap, window, tile, batch_head,
):
    """ROWS queries of one head. q: [B, Hq, Sq, D], k, v: [B, Hkv, Sk, D], out: [B, Sq, Hq, D]."""
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < q_len
    position = row
    dim = tl.arange(0, DIM)
    inside = live[:, None] & (dim < HEAD_DIM)[None, :]
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h
    q_at = q_at + row.to(tl.int64)[:, None] * q_stride_t + dim[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)  # [M, D]
    k_at = k_ptr + batch * k_stride_b + head // GROUP * k_stride_h
    v_at = v_ptr + batch * v_stride_b + head // GROUP * v_stride_h
    end = tl.minimum(kv_len, tl.minimum(q_len, tile * ROWS + ROWS))
    first = 0

    total_max = tl.full([ROWS], float("-inf"), tl.float32)
    total_sum = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DIM], tl.float32)
    for split in tl.range(first, end, SPLIT, num_stages=1, disable_licm=True):
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        high = tl.minimum(split + SPLIT, end)
        for start in tl.range(split, high, KEYS, num_stages=STAGES, disable_licm=True):
            key = start + tl.arange(0, KEYS)
            held = key < end
            k_mask = held[None, :] & (dim < HEAD_DIM)[:, None]
            k = tl.load(k_at + key[None, :].to(tl.int64) * k_stride_t + dim[:, None], mask=k_mask, other=0.0)
            score = tl.dot(q, k, input_precision="ieee")  # [M, N]
            score = score * (scale * LOG2E)
            seen = held[None, :] & live[:, None]
            seen = seen & (key[None, :] <= position[:, None])
            shown = held
            score = tl.where(seen, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp2(score - base[:, None])
            decay = tl.exp2(row_max - base)
            row_sum = tl.fma(row_sum, decay, tl.sum(weight, 1))
            acc = acc * decay[:, None]
            v_mask = shown[:, None] & (dim < HEAD_DIM)[None, :]
            v = tl.load(v_at + key[:, None].to(tl.int64) * v_stride_t + dim[None, :], mask=v_mask, other=0.0)
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            row_max = new_max
        total_max, total_sum, total = fold(total_max, total_sum, total, row_max, row_sum, acc)
    result = finish(total_max, total_sum, total, out_ptr, head)
    at_out = ((batch * q_len + row) * heads + head) * HEAD_DIM
    tl.store(out_ptr + at_out[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[
    "first_ptr", "mask_ptr", "q_len", "kv_len", "heads",
    "mask_stride_b", "mask_stride_h", "mask_stride_q", "mask_stride_k", "window",
])
def dense_attention(
    q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    scale, softcap, window,
):
    """q: [B, Hq, Sq, D], k, v: [B, Hkv, Sk, D], out: [B, Sq, Hq, D]. Program (tile of queries, B · Hq)."""
    attend(
        q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads,
        q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
        v_stride_b, v_stride_h, v_stride_t, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
        scale, softcap, window, tl.program_id(0), tl.program_id(1),
    )
