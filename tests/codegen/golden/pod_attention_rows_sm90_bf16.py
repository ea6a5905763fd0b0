"""Prefill and decode attention over paged keys and values in one launch.

Emitted by llm42 for 32/8 heads of 128, packed rows, bf16, persistent.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import smid

KV_HEADS = tl.constexpr(8)
GROUP = tl.constexpr(4)
HEAD_DIM = tl.constexpr(128)
DIM = tl.constexpr(128)
PAGE = tl.constexpr(16)
SPLIT = tl.constexpr(512)
WINDOW = tl.constexpr(0)
DECODE_ROWS = tl.constexpr(16)
PREFILL_TOKENS = tl.constexpr(16)
DECODE_TOKENS = tl.constexpr(4)
K_TOKEN = tl.constexpr(1024)
K_HEAD = tl.constexpr(128)
V_TOKEN = tl.constexpr(1024)
V_HEAD = tl.constexpr(128)
PREFILL_ROWS = tl.constexpr(64)
SPLIT_ROWS = tl.constexpr(16)
KEYS = tl.constexpr(64)
STAGES = tl.constexpr(2)
NO_HOISTING = tl.constexpr(True)
COUNTERS = tl.constexpr(2048)
TICKETS = tl.constexpr(8)
MAX_SMS = tl.constexpr(2040)
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
    q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, table_ptr, item_ptr, kv_head,
    q_stride_t, q_stride_h, table_stride, scale, softcap,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):
    """One work item: TOKENS tokens of a sequence and one KV head, over all keys or over one split."""
    sequence = tl.load(item_ptr)
    first = tl.load(item_ptr + 1)
    only_split = tl.load(item_ptr + 2)  # -1: all splits, and the result is final
    slot = tl.load(item_ptr + 3)
    q_begin = tl.load(cu_seqlens_ptr + sequence)
    q_len = tl.load(cu_seqlens_ptr + sequence + 1) - q_begin
    kv_len = tl.load(kv_lens_ptr + sequence)

    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = (row < TOKENS * GROUP) & (token < q_len)
    position = kv_len - q_len + token  # [M]
    dim = tl.arange(0, DIM)
    at_row = (q_begin + token).to(tl.int64) * q_stride_t + head.to(tl.int64) * q_stride_h
    inside = live[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + at_row[:, None] + dim[None, :], mask=inside, other=0.0)  # [M, D]

    # Keys that any row of the tile sees: [begin, end).
    end = kv_len - q_len + tl.minimum(first + TOKENS, q_len)
    begin = tl.maximum(kv_len - q_len + first - WINDOW + 1, 0) if WINDOW > 0 else 0
    split_begin = begin // SPLIT
    split_end = (end + SPLIT - 1) // SPLIT
    if only_split >= 0:
        split_begin = only_split
        split_end = only_split + 1

    first_key = tl.load(table_ptr + sequence).to(tl.int64)
    k_ptr = k_cache_ptr + kv_head.to(tl.int64) * K_HEAD
    v_ptr = v_cache_ptr + kv_head.to(tl.int64) * V_HEAD
    total_max = tl.full([ROWS], float("-inf"), tl.float32)
    total_sum = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DIM], tl.float32)
    for split in tl.range(split_begin, split_end, num_stages=1, disable_licm=True):
        low = tl.maximum(split * (SPLIT // KEYS), begin // KEYS)
        high = tl.minimum(split * SPLIT + SPLIT, end)
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        for block in tl.range(low, (high + KEYS - 1) // KEYS, num_stages=STAGES, disable_licm=NO_HOISTING):
            key = block * KEYS + tl.arange(0, KEYS)
            held = (key >= begin) & (key < end)
            k_at = (first_key + key) * K_TOKEN
            v_at = (first_key + key) * V_TOKEN
            k = tl.load(
                k_ptr + k_at[None, :] + dim[:, None],
                mask=held[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
            )
            score = tl.dot(q, k, input_precision="ieee")  # [M, N]
            score = score * (scale * LOG2E)
            seen = key[None, :] <= position[:, None]  # the positions of rows that are kept are before the end
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            score = tl.where(seen, score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp2(score - base[:, None])  # [M, N]
            decay = tl.exp2(row_max - base)
            row_sum = tl.fma(row_sum, decay, tl.sum(weight, 1))
            acc = acc * decay[:, None]
            v = tl.load(
                v_ptr + v_at[:, None] + dim[None, :],
                mask=held[:, None] & (dim < HEAD_DIM)[None, :], other=0.0,
            )
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            row_max = new_max
        total_max, total_sum, total = fold(total_max, total_sum, total, row_max, row_sum, acc)

    if only_split >= 0:
        line = (slot.to(tl.int64) * KV_HEADS + kv_head) * DECODE_ROWS + row
        kept = live & (row < DECODE_ROWS)
        tl.store(stats_ptr + line * 2, total_max, mask=kept)
        tl.store(stats_ptr + line * 2 + 1, total_sum, mask=kept)
        where = partial_ptr + line[:, None] * HEAD_DIM + dim[None, :]
        tl.store(where, total, mask=kept[:, None] & (dim < HEAD_DIM)[None, :])
    else:
        result = finish(total_max, total_sum, total, sinks_ptr, head)
        at_out = ((q_begin + token).to(tl.int64) * KV_HEADS * GROUP + head) * HEAD_DIM
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


@triton.jit
def take(counters_ptr, counts_ptr, sm, prefill_share, decode_share):
    """The next item, as `draw` gives it. Counts are read for every item: registers are dear in the loop."""
    prefills = tl.load(counts_ptr, volatile=True) * KV_HEADS
    decodes = tl.load(counts_ptr + 1, volatile=True) * KV_HEADS
    ticket = tl.atomic_add(counters_ptr + TICKETS + sm, 1, sem="relaxed")
    decode_first = ticket % (prefill_share + decode_share) >= prefill_share
    return draw(counters_ptr, decode_first, prefills, decodes)


@triton.jit
def run(
    role, index, q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr, decode_base,
    q_stride_t, q_stride_h, table_stride, scale, softcap,
):
    """The item that has been taken."""
    item = index // KV_HEADS + tl.where(role == 1, decode_base, 0)
    attend(
        q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
        cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr + item * 4, index % KV_HEADS,
        q_stride_t, q_stride_h, table_stride, scale, softcap, PREFILL_ROWS, PREFILL_TOKENS,
    )


@triton.jit(do_not_specialize=[
    "cu_seqlens_ptr", "kv_lens_ptr", "table_ptr", "table_stride", "decode_base", "prefill_share",
    "decode_share", "one",
])
def pod_attention(
    q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr, counts_ptr, counters_ptr, sm_order_ptr,
    q_stride_t, q_stride_h, table_stride, decode_base, scale, softcap, prefill_share, decode_share, one,
):
    """Resident programs draw items until none is left, in roles by the tickets of their SM."""
    program = tl.program_id(0)
    sm = smid() % MAX_SMS
    role, index = take(counters_ptr, counts_ptr, sm, prefill_share, decode_share)
    while role < 2:
        # `one` is 1, but the compiler does not know: the loop is there for disable_licm, which keeps the
        # tile's addresses from being hoisted out of the work loop at a cost of 40 to 60 registers.
        for _ in tl.range(0, one, disable_licm=True):
            run(
                role, index, q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
                cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr, decode_base,
                q_stride_t, q_stride_h, table_stride, scale, softcap,
            )
        role, index = take(counters_ptr, counts_ptr, sm, prefill_share, decode_share)
    # The last program to finish leaves the counters as it found them: zero. Its addition acquires what the
    # others' have released, which is their draws.
    finished = tl.atomic_add(counters_ptr + 2, 1, sem="acq_rel")
    if finished == tl.num_programs(0) - 1:
        tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
