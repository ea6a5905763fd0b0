"""Two calls of attention in one launch.

Emitted by llm42 for heads of 128 in groups of 4, bf16,
and heads of 128 in groups of 4, bf16.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import smid

PREFILL_GROUP = tl.constexpr(4)
PREFILL_HEAD_DIM = tl.constexpr(128)
PREFILL_DIM = tl.constexpr(128)
PREFILL_ROWS = tl.constexpr(32)
PREFILL_KEYS = tl.constexpr(32)
PREFILL_SPLIT = tl.constexpr(512)
PREFILL_STAGES = tl.constexpr(1)
PREFILL_CAUSAL = tl.constexpr(True)
LOG2E = tl.constexpr(1.4426950408889634)
DECODE_GROUP = tl.constexpr(4)
DECODE_HEAD_DIM = tl.constexpr(128)
DECODE_DIM = tl.constexpr(128)
DECODE_ROWS = tl.constexpr(32)
DECODE_KEYS = tl.constexpr(32)
DECODE_SPLIT = tl.constexpr(512)
DECODE_STAGES = tl.constexpr(1)
DECODE_CAUSAL = tl.constexpr(False)
COUNTERS = tl.constexpr(2048)
TICKETS = tl.constexpr(8)
MAX_SMS = tl.constexpr(2040)


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
def attend_prefill(
    q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads, q_stride_b, q_stride_h,
    q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, mask_stride_b,
    mask_stride_h, mask_stride_q, mask_stride_k, scale, softcap, window,
    tile, batch_head,
):
    """ROWS queries of one head. q: [B, Hq, Sq, D], k, v: [B, Hkv, Sk, D], out: [B, Sq, Hq, D]."""
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    row = tile * PREFILL_ROWS + tl.arange(0, PREFILL_ROWS)
    live = row < q_len
    position = row if PREFILL_CAUSAL else row + (kv_len - q_len)
    dim = tl.arange(0, PREFILL_DIM)
    inside = live[:, None] & (dim < PREFILL_HEAD_DIM)[None, :]
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h
    q_at = q_at + row.to(tl.int64)[:, None] * q_stride_t + dim[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)  # [M, D]
    k_at = k_ptr + batch * k_stride_b + head // PREFILL_GROUP * k_stride_h
    v_at = v_ptr + batch * v_stride_b + head // PREFILL_GROUP * v_stride_h
    end = kv_len
    if PREFILL_CAUSAL:
        end = tl.minimum(kv_len, tl.minimum(q_len, tile * PREFILL_ROWS + PREFILL_ROWS))
    first = 0

    total_max = tl.full([PREFILL_ROWS], float("-inf"), tl.float32)
    total_sum = tl.zeros([PREFILL_ROWS], tl.float32)
    total = tl.zeros([PREFILL_ROWS, PREFILL_DIM], tl.float32)
    for split in tl.range(first, end, PREFILL_SPLIT, num_stages=1, disable_licm=True):
        row_max = tl.full([PREFILL_ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([PREFILL_ROWS], tl.float32)
        acc = tl.zeros([PREFILL_ROWS, PREFILL_DIM], tl.float32)
        high = tl.minimum(split + PREFILL_SPLIT, end)
        for start in tl.range(split, high, PREFILL_KEYS, num_stages=PREFILL_STAGES, disable_licm=True):
            key = start + tl.arange(0, PREFILL_KEYS)
            held = key < end
            k = tl.load(
                k_at + key[None, :].to(tl.int64) * k_stride_t + dim[:, None],
                mask=held[None, :] & (dim < PREFILL_HEAD_DIM)[:, None], other=0.0,
            )  # [D, N]
            score = tl.dot(q, k, input_precision="ieee")
            score = score * (scale * LOG2E)
            seen = held[None, :] & live[:, None]
            seen = seen & (key[None, :] <= position[:, None])
            score = tl.where(seen, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp2(score - base[:, None])
            decay = tl.exp2(row_max - base)
            row_sum = tl.fma(row_sum, decay, tl.sum(weight, 1))
            acc = acc * decay[:, None]
            v = tl.load(
                v_at + key[:, None].to(tl.int64) * v_stride_t + dim[None, :],
                mask=held[:, None] & (dim < PREFILL_HEAD_DIM)[None, :], other=0.0,
            )  # [N, D]
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            row_max = new_max
        total_max, total_sum, total = fold(total_max, total_sum, total, row_max, row_sum, acc)
    result = finish(total_max, total_sum, total, out_ptr, head)
    at_out = ((batch * q_len + row) * heads + head) * PREFILL_HEAD_DIM
    tl.store(out_ptr + at_out[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attend_decode(
    q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads, q_stride_b, q_stride_h,
    q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, mask_stride_b,
    mask_stride_h, mask_stride_q, mask_stride_k, scale, softcap, window,
    tile, batch_head,
):
    """ROWS queries of one head. q: [B, Hq, Sq, D], k, v: [B, Hkv, Sk, D], out: [B, Sq, Hq, D]."""
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    row = tile * DECODE_ROWS + tl.arange(0, DECODE_ROWS)
    live = row < q_len
    position = row if DECODE_CAUSAL else row + (kv_len - q_len)
    dim = tl.arange(0, DECODE_DIM)
    inside = live[:, None] & (dim < DECODE_HEAD_DIM)[None, :]
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h
    q_at = q_at + row.to(tl.int64)[:, None] * q_stride_t + dim[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)  # [M, D]
    k_at = k_ptr + batch * k_stride_b + head // DECODE_GROUP * k_stride_h
    v_at = v_ptr + batch * v_stride_b + head // DECODE_GROUP * v_stride_h
    end = kv_len
    if DECODE_CAUSAL:
        end = tl.minimum(kv_len, tl.minimum(q_len, tile * DECODE_ROWS + DECODE_ROWS))
    first = tl.load(first_ptr + batch)

    total_max = tl.full([DECODE_ROWS], float("-inf"), tl.float32)
    total_sum = tl.zeros([DECODE_ROWS], tl.float32)
    total = tl.zeros([DECODE_ROWS, DECODE_DIM], tl.float32)
    for split in tl.range(first, end, DECODE_SPLIT, num_stages=1, disable_licm=True):
        row_max = tl.full([DECODE_ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([DECODE_ROWS], tl.float32)
        acc = tl.zeros([DECODE_ROWS, DECODE_DIM], tl.float32)
        high = tl.minimum(split + DECODE_SPLIT, end)
        for start in tl.range(split, high, DECODE_KEYS, num_stages=DECODE_STAGES, disable_licm=True):
            key = start + tl.arange(0, DECODE_KEYS)
            held = key < end
            k = tl.load(
                k_at + key[None, :].to(tl.int64) * k_stride_t + dim[:, None],
                mask=held[None, :] & (dim < DECODE_HEAD_DIM)[:, None], other=0.0,
            )  # [D, N]
            score = tl.dot(q, k, input_precision="ieee")
            score = score * (scale * LOG2E)
            seen = held[None, :] & live[:, None]
            at = mask_ptr + batch * mask_stride_b + head * mask_stride_h
            at = at + row[:, None].to(tl.int64) * mask_stride_q + key[None, :].to(tl.int64) * mask_stride_k
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
            shown = tl.max(seen.to(tl.int32), 0) > 0  # [N]
            score = tl.where(seen, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp2(score - base[:, None])
            decay = tl.exp2(row_max - base)
            row_sum = tl.fma(row_sum, decay, tl.sum(weight, 1))
            acc = acc * decay[:, None]
            v = tl.load(
                v_at + key[:, None].to(tl.int64) * v_stride_t + dim[None, :],
                mask=shown[:, None] & (dim < DECODE_HEAD_DIM)[None, :], other=0.0,
            )  # [N, D]
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            row_max = new_max
        total_max, total_sum, total = fold(total_max, total_sum, total, row_max, row_sum, acc)
    result = finish(total_max, total_sum, total, out_ptr, head)
    at_out = ((batch * q_len + row) * heads + head) * DECODE_HEAD_DIM
    tl.store(out_ptr + at_out[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def draw(counters_ptr, decode_first, prefills, decodes):
    """(role, index) of the next item: role 0 is prefill, 1 decode, 2 means that nothing is left.

    Whose role has run dry takes over the other's.
    """
    role = decode_first.to(tl.int32)
    index = tl.atomic_add(counters_ptr + role, 1, sem="relaxed")
    if index >= tl.where(role == 1, decodes, prefills):
        role = 1 - role
        index = tl.atomic_add(counters_ptr + role, 1, sem="relaxed")
        if index >= tl.where(role == 1, decodes, prefills):
            role = role * 0 + 2
    return role, index


@triton.jit(do_not_specialize=[
    "first_ptr", "mask_ptr", "q_len", "kv_len", "heads", "mask_stride_b", "mask_stride_h", "mask_stride_q",
    "mask_stride_k", "window", "decode_first_ptr", "decode_mask_ptr", "decode_q_len", "decode_kv_len",
    "decode_heads", "decode_mask_stride_b", "decode_mask_stride_h", "decode_mask_stride_q",
    "decode_mask_stride_k", "decode_window", "prefill_tiles", "prefill_lines", "decode_lines", "prefills",
    "decodes", "prefill_share", "decode_share",
])
def pod_dense_attention(
    q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads, q_stride_b, q_stride_h,
    q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t, mask_stride_b,
    mask_stride_h, mask_stride_q, mask_stride_k, scale, softcap, window,
    decode_q_ptr, decode_k_ptr, decode_v_ptr, decode_mask_ptr, decode_first_ptr, decode_out_ptr,
    decode_q_len, decode_kv_len, decode_heads, decode_q_stride_b, decode_q_stride_h, decode_q_stride_t,
    decode_k_stride_b, decode_k_stride_h, decode_k_stride_t, decode_v_stride_b, decode_v_stride_h,
    decode_v_stride_t, decode_mask_stride_b, decode_mask_stride_h, decode_mask_stride_q,
    decode_mask_stride_k, decode_scale, decode_softcap, decode_window,
    counters_ptr, sm_order_ptr, prefill_tiles, prefill_lines, decode_lines, prefills, decodes,
    prefill_share, decode_share,
):
    """One tile a program. Shapes as in dense_attention, twice; the last tile of a prefill has most keys."""
    program = tl.program_id(0)
    sm = smid() % MAX_SMS
    ticket = tl.atomic_add(counters_ptr + TICKETS + sm, 1, sem="relaxed")
    role, index = draw(
        counters_ptr, ticket % (prefill_share + decode_share) >= prefill_share, prefills, decodes
    )
    if role == 0:
        attend_prefill(
            q_ptr, k_ptr, v_ptr, mask_ptr, first_ptr, out_ptr, q_len, kv_len, heads, q_stride_b,
            q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_t, v_stride_b, v_stride_h, v_stride_t,
            mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, scale, softcap, window,
            prefill_tiles - 1 - index // prefill_lines, index % prefill_lines,
        )
    elif role == 1:
        attend_decode(
            decode_q_ptr, decode_k_ptr, decode_v_ptr, decode_mask_ptr, decode_first_ptr, decode_out_ptr,
            decode_q_len, decode_kv_len, decode_heads, decode_q_stride_b, decode_q_stride_h,
            decode_q_stride_t, decode_k_stride_b, decode_k_stride_h, decode_k_stride_t, decode_v_stride_b,
            decode_v_stride_h, decode_v_stride_t, decode_mask_stride_b, decode_mask_stride_h,
            decode_mask_stride_q, decode_mask_stride_k, decode_scale, decode_softcap, decode_window,
            index // decode_lines, index % decode_lines,
        )
    # The last program to finish leaves the counters as it found them: zero.
    finished = tl.atomic_add(counters_ptr + 2, 1, sem="acq_rel")
    if finished == tl.num_programs(0) - 1:
        tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
