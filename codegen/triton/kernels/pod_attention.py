"""Hybrid attention: prefill tiles and decode splits drawn from one work list by one launch."""

import triton
import triton.language as tl
from triton.language.extra.cuda import smid

from llm42c.codegen.triton.kernels.attention_parts import draw, finish, fold

KV_HEADS = tl.constexpr(8)
GROUP = tl.constexpr(4)  # query heads of one KV head
HEAD_DIM = tl.constexpr(128)
DIM = tl.constexpr(128)  # the power of two from HEAD_DIM
PAGE = tl.constexpr(16)
SPLIT = tl.constexpr(512)
WINDOW = tl.constexpr(0)
DECODE_ROWS = tl.constexpr(16)
PREFILL_TOKENS = tl.constexpr(16)
DECODE_TOKENS = tl.constexpr(4)
K_PAGE, K_TOKEN, K_HEAD = (
    tl.constexpr(16384),
    tl.constexpr(1024),
    tl.constexpr(128),
)  # strides, but for the cache
V_PAGE, V_TOKEN, V_HEAD = tl.constexpr(16384), tl.constexpr(1024), tl.constexpr(128)
PREFILL_ROWS = tl.constexpr(64)
SPLIT_ROWS = tl.constexpr(64)
KEYS = tl.constexpr(32)
STAGES = tl.constexpr(2)
NO_HOISTING = tl.constexpr(True)
COUNTERS = tl.constexpr(2048)
TICKETS = tl.constexpr(8)
MAX_SMS = tl.constexpr(2040)
SMS = tl.constexpr(132)
LOG2E = tl.constexpr(1.4426950408889634)

LAYOUT = tl.constexpr("cache")  # of keys: our "cache", a "pool" of pages of tokens, or packed "rows"
ONE_PAGE = tl.constexpr(False)  # a block of keys lies in one page
CAPPED = tl.constexpr(False)
SCHEDULER = tl.constexpr("persistent")  # or "tickets", "partition"
UNIFORM = tl.constexpr(True)  # one tile for both roles
SM = tl.constexpr("register")  # where a program learns on which SM it runs; or "program", "table"


@triton.jit
def attend(
    q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, table_ptr, item_ptr, kv_head,
    q_stride_t, q_stride_h, table_stride, scale, softcap,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
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

    if LAYOUT == "rows":
        first_key = tl.load(table_ptr + sequence).to(tl.int64)
    else:
        pages_ptr = table_ptr + sequence.to(tl.int64) * table_stride
    if LAYOUT == "cache":
        k_ptr = k_cache_ptr + kv_head.to(tl.int64) * (HEAD_DIM * PAGE)
        v_ptr = v_cache_ptr + kv_head.to(tl.int64) * (HEAD_DIM * PAGE)
    else:
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
            if LAYOUT == "cache":
                # Sixteen keys lie in one page, so they are fetched together, in wide loads; what stands after
                # the last key is looked at by nobody. Values must not be fetched there: 0 times NaN is NaN.
                near = (key // 16 * 16 < end) & (key // 16 * 16 + 16 > begin)  # [N]
                if ONE_PAGE:
                    page = tl.load(pages_ptr + block * KEYS // PAGE).to(tl.int64)
                else:
                    page = tl.load(pages_ptr + key // PAGE, mask=near, other=0).to(tl.int64)
                    page = tl.max_constancy(page, 16)
                k_at = page * (KV_HEADS * HEAD_DIM * PAGE) + key % PAGE
                v_at = page * (KV_HEADS * HEAD_DIM * PAGE) + key % PAGE * HEAD_DIM
                k = tl.load(
                    k_ptr + k_at[None, :] + dim[:, None] * PAGE,
                    mask=near[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
                )  # fmt: skip
            else:
                if LAYOUT == "rows":
                    k_at = (first_key + key) * K_TOKEN
                    v_at = (first_key + key) * V_TOKEN
                else:
                    if ONE_PAGE:
                        page = tl.load(pages_ptr + block * KEYS // PAGE).to(tl.int64)
                    else:
                        page = tl.load(pages_ptr + key // PAGE, mask=held, other=0).to(tl.int64)  # [N]
                    k_at = page * K_PAGE + key % PAGE * K_TOKEN
                    v_at = page * V_PAGE + key % PAGE * V_TOKEN
                k = tl.load(
                    k_ptr + k_at[None, :] + dim[:, None],
                    mask=held[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
                )  # fmt: skip
            score = tl.dot(q, k, input_precision="ieee")  # [M, N]
            if CAPPED:
                capped = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2E * scale / softcap)))  # tanh
                score = capped * (softcap * LOG2E)
            else:
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
            )  # fmt: skip
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
def take(counters_ptr, counts_ptr, sm, prefill_share, decode_share):
    """The next item, as `draw` gives it. Counts are read for every item: registers are dear in the loop."""
    prefills = tl.load(counts_ptr, volatile=True) * KV_HEADS
    decodes = tl.load(counts_ptr + 1, volatile=True) * KV_HEADS
    if SCHEDULER == "partition":
        decode_first = sm % (prefill_share + decode_share) >= prefill_share
    else:
        ticket = tl.atomic_add(counters_ptr + TICKETS + sm, 1, sem="relaxed")
        decode_first = ticket % (prefill_share + decode_share) >= prefill_share
    return draw(counters_ptr, decode_first, prefills, decodes)


@triton.jit
def run(
    role, index, q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr, decode_base,
    q_stride_t, q_stride_h, table_stride, scale, softcap,
):  # fmt: skip
    """The item that has been taken."""
    if UNIFORM:  # one body for both roles: the items differ in their numbers only
        item = index // KV_HEADS + tl.where(role == 1, decode_base, 0)
        attend(
            q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
            cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr + item * 4, index % KV_HEADS,
            q_stride_t, q_stride_h, table_stride, scale, softcap, PREFILL_ROWS, PREFILL_TOKENS,
        )  # fmt: skip
    elif role == 0:
        attend(
            q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
            cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr + index // KV_HEADS * 4, index % KV_HEADS,
            q_stride_t, q_stride_h, table_stride, scale, softcap, PREFILL_ROWS, PREFILL_TOKENS,
        )  # fmt: skip
    else:
        attend(
            q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
            cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr + (decode_base + index // KV_HEADS) * 4,
            index % KV_HEADS, q_stride_t, q_stride_h, table_stride, scale, softcap, SPLIT_ROWS, DECODE_TOKENS,
        )  # fmt: skip


# Counts and shares follow the batch, and `one` must stay unknown: none may select another binary.
@triton.jit(do_not_specialize=[
    "cu_seqlens_ptr", "kv_lens_ptr", "table_ptr", "table_stride", "decode_base", "prefill_share",
    "decode_share", "one",
])  # fmt: skip
def pod_attention(
    q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr, counts_ptr, counters_ptr, sm_order_ptr,
    q_stride_t, q_stride_h, table_stride, decode_base, scale, softcap, prefill_share, decode_share, one,
):  # fmt: skip
    """`table`: the pages of each sequence, or where its packed rows begin."""
    program = tl.program_id(0)
    if SM == "register":
        sm = smid() % MAX_SMS
    elif SM == "program":
        sm = program % SMS
    else:
        sm = tl.load(sm_order_ptr + program) % MAX_SMS
    if SCHEDULER == "tickets":
        if program < (tl.load(counts_ptr) + tl.load(counts_ptr + 1)) * KV_HEADS:
            role, index = take(counters_ptr, counts_ptr, sm, prefill_share, decode_share)
            run(
                role, index, q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
                cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr, decode_base,
                q_stride_t, q_stride_h, table_stride, scale, softcap,
            )  # fmt: skip
    else:
        role, index = take(counters_ptr, counts_ptr, sm, prefill_share, decode_share)
        while role < 2:
            # `one` is 1, but the compiler does not know: the loop is there for disable_licm, which keeps the
            # tile's addresses from being hoisted out of the work loop at a cost of 40 to 60 registers.
            for _ in tl.range(0, one, disable_licm=True):
                run(
                    role, index, q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
                    cu_seqlens_ptr, kv_lens_ptr, table_ptr, items_ptr, decode_base,
                    q_stride_t, q_stride_h, table_stride, scale, softcap,
                )  # fmt: skip
            role, index = take(counters_ptr, counts_ptr, sm, prefill_share, decode_share)
    # The last program to finish leaves the counters as it found them: zero. Its addition acquires what the
    # others' have released, which is their draws.
    finished = tl.atomic_add(counters_ptr + 2, 1, sem="acq_rel")
    if finished == tl.num_programs(0) - 1:
        tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
