"""The hybrid attention kernel: prefill tiles and decode splits drawn from one work list by one launch.

The idea of mixing both on every SM is POD-Attention's (Kamath et al., ASPLOS 2025). Here a work item is
one KV head of either a tile of a sequence's tokens over all of its keys, or a few tokens over one split of
the keys. Who runs an item is up to the scheduler; what an item computes is not:

- keys in blocks of ``keys`` from absolute position 0, an online softmax (Milakov and Gimelshein, arXiv
  1805.02867) inside a split of ``split`` positions, splits folded from the left in index order;
- a split or a block in which a row sees nothing leaves the row's state as it is, bit for bit, so
  neighbours in a tile do not matter;
- the fold is written with explicit fused multiply-adds and compiled without contraction, so folding in
  registers (prefill) and in the combining kernel (decode) give the same bits.
"""

from __future__ import annotations

import functools

from llm42c.codegen.triton import fragments
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.fragments import indent
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import AttentionSpec

_TILE = '''
@triton.jit
def attend(
    q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, block_table_ptr, item_ptr, kv_head,
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

@HEAD@
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
@KEYS@
            score = tl.dot(q, k, input_precision="ieee")  # [M, N]
@SCORE@
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
            )  # [N, D]
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
'''

# Keys and values of one head; then, for a block, where its keys and values begin.
_HEAD_OF_CACHE = """
    pages_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride
    k_ptr = k_cache_ptr + kv_head.to(tl.int64) * (HEAD_DIM * PAGE)
    v_ptr = v_cache_ptr + kv_head.to(tl.int64) * (HEAD_DIM * PAGE)
"""
_HEAD_OF_POOL = """
    pages_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride
    k_ptr = k_cache_ptr + kv_head.to(tl.int64) * K_HEAD
    v_ptr = v_cache_ptr + kv_head.to(tl.int64) * V_HEAD
"""
_HEAD_OF_ROWS = """
    first_key = tl.load(cu_seqlens_k_ptr + sequence).to(tl.int64)
    k_ptr = k_cache_ptr + kv_head.to(tl.int64) * K_HEAD
    v_ptr = v_cache_ptr + kv_head.to(tl.int64) * V_HEAD
"""
# Sixteen keys lie in one page, so they are fetched together, in wide loads; what stands after the last key
# is looked at by nobody. Values must not be fetched there: 0 times NaN is NaN.
_PAGE_OF_KEYS = """
            near = (key // 16 * 16 < end) & (key // 16 * 16 + 16 > begin)  # [N]
            page = tl.load(pages_ptr + key // PAGE, mask=near, other=0).to(tl.int64)
            page = tl.max_constancy(page, 16)
"""
_ONE_PAGE = """
            near = (key // 16 * 16 < end) & (key // 16 * 16 + 16 > begin)  # [N]
            page = tl.load(pages_ptr + block * KEYS // PAGE).to(tl.int64)  # a block of keys lies in one page
"""
_IN_CACHE = """
            k_at = page * (KV_HEADS * HEAD_DIM * PAGE) + key % PAGE
            v_at = page * (KV_HEADS * HEAD_DIM * PAGE) + key % PAGE * HEAD_DIM
            k = tl.load(
                k_ptr + k_at[None, :] + dim[:, None] * PAGE,
                mask=near[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
            )  # [D, N]
"""
_PAGE_OF_TOKENS = """
            page = tl.load(pages_ptr + key // PAGE, mask=held, other=0).to(tl.int64)  # [N]
"""
_PAGE_OF_BLOCK = """
            page = tl.load(pages_ptr + block * KEYS // PAGE).to(tl.int64)  # a block of keys lies in one page
"""
_IN_POOL = """
            k_at = page * K_PAGE + key % PAGE * K_TOKEN
            v_at = page * V_PAGE + key % PAGE * V_TOKEN
"""
_IN_ROWS = """
            k_at = (first_key + key) * K_TOKEN
            v_at = (first_key + key) * V_TOKEN
"""
_KEYS_OF_TOKENS = """
            k = tl.load(
                k_ptr + k_at[None, :] + dim[:, None],
                mask=held[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
            )  # [D, N]
"""
_SCALE = """
            score = score * (scale * LOG2E)
"""
_SCALE_AND_CAP = """
            capped = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2E * scale / softcap)))  # tanh
            score = capped * (softcap * LOG2E)
"""

# Counts and shares follow the batch, and `one` must stay unknown: none may select another binary.
_MAIN_HEAD = '''
@triton.jit(do_not_specialize=[
    "cu_seqlens_ptr", "kv_lens_ptr", "block_table_ptr", "table_stride", "decode_base", "prefill_share",
    "decode_share", "one",
])
def pod_attention(
    q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, block_table_ptr, items_ptr, counts_ptr, counters_ptr, sm_order_ptr,
    q_stride_t, q_stride_h, table_stride, decode_base, scale, softcap, prefill_share, decode_share, one,
):
    """@DOC@"""
    program = tl.program_id(0)
    sm = @SM@
'''

_RUN = """
if role == 0:
    attend(
        q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
        cu_seqlens_ptr, kv_lens_ptr, block_table_ptr, items_ptr + index // KV_HEADS * 4, index % KV_HEADS,
        q_stride_t, q_stride_h, table_stride, scale, softcap,
        PREFILL_ROWS, PREFILL_TOKENS,
    )
else:
    attend(
        q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
        cu_seqlens_ptr, kv_lens_ptr, block_table_ptr,
        items_ptr + (decode_base + index // KV_HEADS) * 4, index % KV_HEADS,
        q_stride_t, q_stride_h, table_stride, scale, softcap,
        SPLIT_ROWS, DECODE_TOKENS,
    )
"""
# One body for both roles: the items differ in their numbers only.
_RUN_UNIFORM = """
item = index // KV_HEADS + tl.where(role == 1, decode_base, 0)
attend(
    q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, block_table_ptr, items_ptr + item * 4, index % KV_HEADS,
    q_stride_t, q_stride_h, table_stride, scale, softcap,
    PREFILL_ROWS, PREFILL_TOKENS,
)
"""

# Read again for every item: registers are dear in the loop.
_COUNTS = """
prefills = tl.load(counts_ptr, volatile=True) * KV_HEADS
decodes = tl.load(counts_ptr + 1, volatile=True) * KV_HEADS
"""
_SIDE = """
decodes_first = sm % (prefill_share + decode_share) >= prefill_share
role, index = draw(counters_ptr, decodes_first, prefills, decodes)
"""

# `one` is 1, but the compiler does not know: the loop is there for disable_licm, which keeps the tile's
# addresses from being hoisted out of the work loop at a cost of 40 to 60 registers.
_LOOP = """
{draw}
while role < 2:
    for _ in tl.range(0, one, disable_licm=True):
{run}
{again}
"""
_ONCE = """
if program < (tl.load(counts_ptr) + tl.load(counts_ptr + 1)) * KV_HEADS:
{draw}
{run}
"""
_DOCS = {
    "tickets": "One item a program: an SM's programs take roles in turn by the tickets of their SM.",
    "persistent": "Resident programs draw items until none is left, in roles by the tickets of their SM.",
    "partition": "Some SMs begin with prefill, the others with decode; who runs dry takes over.",
}


def _main(spec: AttentionSpec) -> str:
    head = _MAIN_HEAD.replace("@SM@", fragments.SM[spec.sm]).replace("@DOC@", _DOCS[spec.scheduler])
    run = _RUN_UNIFORM if spec.uniform else _RUN
    if spec.scheduler == "tickets":
        body = _ONCE.format(draw=indent(_COUNTS + fragments.TICKET.lstrip("\n"), 4), run=indent(run, 4))
    else:
        order = fragments.TICKET if spec.scheduler == "persistent" else _SIDE
        draw = (_COUNTS + order.lstrip("\n")).strip("\n")
        body = _LOOP.format(draw=draw, run=indent(run, 8), again=indent(draw, 4))
    return head.rstrip("\n") + "\n" + indent(body, 4) + "\n" + indent(fragments.RESET, 4)


def _tile(spec: AttentionSpec) -> str:
    """The body of a work item for a layout of keys."""
    one = spec.page % spec.keys == 0
    cached, pooled = (_ONE_PAGE, _PAGE_OF_BLOCK) if one else (_PAGE_OF_KEYS, _PAGE_OF_TOKENS)
    head, keys = {
        "cache": (_HEAD_OF_CACHE, cached + _IN_CACHE.lstrip("\n")),
        "pool": (_HEAD_OF_POOL, pooled + _IN_POOL.lstrip("\n") + _KEYS_OF_TOKENS.lstrip("\n")),
        "rows": (_HEAD_OF_ROWS, _IN_ROWS + _KEYS_OF_TOKENS.lstrip("\n")),
    }[spec.layout]
    tile = _TILE.replace("@HEAD@", head.strip("\n")).replace("@KEYS@", keys.strip("\n"))
    return tile.replace("@SCORE@", (_SCALE_AND_CAP if spec.softcap else _SCALE).strip("\n"))


def _for_layout(text: str, layout: str) -> str:
    """Packed rows have no pages: where each sequence's keys begin stands in place of the table."""
    if layout != "rows":
        return text
    text = text.replace('"table_stride", ', "").replace("table_stride, ", "")
    return text.replace("block_table_ptr", "cu_seqlens_k_ptr")


@functools.cache
def emit(spec: AttentionSpec) -> str:
    """The file of one specialisation; its kernel is ``pod_attention``."""
    constants = {
        **spec.constants(),
        **spec.stride_constants(),
        "PREFILL_ROWS": spec.rows,
        "SPLIT_ROWS": spec.decode_rows,
        "KEYS": spec.keys,
        "STAGES": spec.stages,
        "NO_HOISTING": not spec.hoist,
        **fragments.COUNTER_CONSTANTS,
        "LOG2E": 1.4426950408889634,
    }
    if spec.sm == "program":
        constants["SMS"] = spec.sms
    return module(
        "Prefill and decode attention over paged keys and values in one launch",
        spec.subject(),
        constants,
        *fragments.states(spec.sinks),
        _for_layout(_tile(spec), spec.layout),
        fold("attention_parts", "draw"),
        _for_layout(_main(spec), spec.layout),
        imports=fragments.IMPORT_SMID if spec.sm == "register" else "",
    )
