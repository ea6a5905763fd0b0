"""Attention over dense keys and values: one program a tile of queries and head."""

import triton
import triton.language as tl

from llm42c.codegen.triton.kernels.attention_parts import finish, fold

GROUP = tl.constexpr(4)  # query heads of one KV head
HEAD_DIM = tl.constexpr(128)
DIM = tl.constexpr(128)  # the power of two from HEAD_DIM
ROWS = tl.constexpr(32)
KEYS = tl.constexpr(32)
SPLIT = tl.constexpr(512)
STAGES = tl.constexpr(1)
LOG2E = tl.constexpr(1.4426950408889634)

CAUSAL = tl.constexpr(True)
WINDOWED = tl.constexpr(False)
CAPPED = tl.constexpr(False)
MASKED = tl.constexpr(False)
ADDED = tl.constexpr(False)  # the mask is added to the scores; else it says which keys are seen


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    scale, softcap, window, tile, batch_head,
):  # fmt: skip
    """ROWS queries of one head. q: [B, Hq, Sq, D], k, v: [B, Hkv, Sk, D], out: [B, Sq, Hq, D]."""
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < q_len
    if CAUSAL:
        position = row
    else:
        position = row + (kv_len - q_len)
    dim = tl.arange(0, DIM)
    inside = live[:, None] & (dim < HEAD_DIM)[None, :]
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h
    q_at = q_at + row.to(tl.int64)[:, None] * q_stride_t + dim[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)  # [M, D]
    k_at = k_ptr + batch * k_stride_b + head // GROUP * k_stride_h
    v_at = v_ptr + batch * v_stride_b + head // GROUP * v_stride_h
    if CAUSAL:
        end = tl.minimum(kv_len, tl.minimum(q_len, tile * ROWS + ROWS))
    else:
        end = kv_len
    if MASKED:
        first = tl.load(first_ptr + batch)
    else:
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
            if CAPPED:
                capped = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2E * scale / softcap)))  # tanh
                score = capped * (softcap * LOG2E)
            else:
                score = score * (scale * LOG2E)
            seen = held[None, :] & live[:, None]
            if CAUSAL:
                seen = seen & (key[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (key[None, :] > position[:, None] - window)
            if MASKED:
                at = mask_ptr + batch * mask_stride_b + head * mask_stride_h
                at = (
                    at + row[:, None].to(tl.int64) * mask_stride_q + key[None, :].to(tl.int64) * mask_stride_k
                )
                if ADDED:
                    added = tl.load(at, mask=seen, other=0.0)
                    seen = seen & (added != float("-inf"))
                    score = score + added * LOG2E
                else:
                    seen = seen & (tl.load(at, mask=seen, other=0) != 0)
            if MASKED or WINDOWED:  # a whole tile may not see a key
                shown = tl.max(seen.to(tl.int32), 0) > 0  # [N]
            else:
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


# What follows the batch, or may be anything, selects no binary.
@triton.jit(do_not_specialize=[
    "first_ptr", "mask_ptr", "q_len", "kv_len", "heads",
    "mask_stride_b", "mask_stride_h", "mask_stride_q", "mask_stride_k", "window",
])  # fmt: skip
def dense_attention(
    q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    scale, softcap, window,
):  # fmt: skip
    """q: [B, Hq, Sq, D], k, v: [B, Hkv, Sk, D], out: [B, Sq, Hq, D]. Program (tile of queries, B · Hq)."""
    attend(
        q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads,
        q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t,
        v_stride_b, v_stride_h, v_stride_t, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
        scale, softcap, window, tl.program_id(0), tl.program_id(1),
    )  # fmt: skip
