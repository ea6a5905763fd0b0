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

from llm42c.codegen.triton import fragments
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import AttentionSpec

COUNTERS = 2048  # next prefill item, next decode item, finished programs, then a ticket counter an SM
_FIRST_TICKET = 8

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
    at_row = (q_begin + token).to(tl.int64) * q_stride_t + head * q_stride_h
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

    pages_ptr = block_table_ptr + sequence.to(tl.int64) * table_stride
    k_ptr = k_cache_ptr + kv_head.to(tl.int64) * (HEAD_DIM * PAGE)
    v_ptr = v_cache_ptr + kv_head.to(tl.int64) * (HEAD_DIM * PAGE)
    total_max = tl.full([ROWS], float("-inf"), tl.float32)
    total_sum = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DIM], tl.float32)
    for split in tl.range(split_begin, split_end, num_stages=1, disable_licm=True):
        low = tl.maximum(split * SPLIT, begin // KEYS * KEYS)
        high = tl.minimum(split * SPLIT + SPLIT, end)
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        for start in tl.range(low, high, KEYS, num_stages=STAGES, disable_licm=True):
            key = start + tl.arange(0, KEYS)
            held = (key >= begin) & (key < end)
@PAGES@
            k = tl.load(
                k_ptr + at_page[None, :] + dim[:, None] * PAGE + (key % PAGE)[None, :],
                mask=held[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
            )  # [D, N]
            score = tl.dot(q, k, input_precision="ieee")  # [M, N]
@SCORE@
            seen = (key[None, :] <= position[:, None]) & (key < end)[None, :]
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
                v_ptr + at_page[:, None] + (key % PAGE)[:, None] * HEAD_DIM + dim[None, :],
                mask=held[:, None] & (dim < HEAD_DIM)[None, :], other=0.0,
            )  # [N, D]
            acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
            row_max = new_max
        total_max, total_sum, total = fold(total_max, total_sum, total, row_max, row_sum, acc)

    if only_split >= 0:
        line = (slot.to(tl.int64) * KV_HEADS + kv_head) * DECODE_ROWS + row
        kept = row < DECODE_ROWS
        tl.store(stats_ptr + line * 2, total_max, mask=kept)
        tl.store(stats_ptr + line * 2 + 1, total_sum, mask=kept)
        where = partial_ptr + line[:, None] * HEAD_DIM + dim[None, :]
        tl.store(where, total, mask=kept[:, None] & (dim < HEAD_DIM)[None, :])
    else:
        result = finish(total_max, total_sum, total, sinks_ptr, head)
        at_out = ((q_begin + token).to(tl.int64) * KV_HEADS * GROUP + head) * HEAD_DIM
        tl.store(out_ptr + at_out[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
'''

_PAGE_OF_EACH_KEY = """
            page = tl.load(pages_ptr + key // PAGE, mask=held, other=0)
            at_page = page.to(tl.int64) * (KV_HEADS * HEAD_DIM * PAGE)  # [N]
"""
_ONE_PAGE = """
            page = tl.load(pages_ptr + start // PAGE)  # a block of keys lies in one page
            at_page = (page.to(tl.int64) * (KV_HEADS * HEAD_DIM * PAGE)) + tl.zeros([KEYS], tl.int64)
"""
_SCALE = """
            score = score * (scale * LOG2E)
"""
_SCALE_AND_CAP = """
            capped = 1.0 - 2.0 / (1.0 + tl.exp2(score * (2.0 * LOG2E * scale / softcap)))  # tanh
            score = capped * (softcap * LOG2E)
"""

_DRAW = '''
@triton.jit
def draw(counters_ptr, decode_first, prefills, decodes):
    """(role, index) of the next item: role 0 is prefill, 1 decode, 2 means that nothing is left.

    Whose role has run dry takes over the other's.
    """
    role = decode_first.to(tl.int32)
    index = tl.atomic_add(counters_ptr + role, 1)
    if index >= tl.where(role == 1, decodes, prefills):
        role = 1 - role
        index = tl.atomic_add(counters_ptr + role, 1)
        if index >= tl.where(role == 1, decodes, prefills):
            role = role * 0 + 2
    return role, index
'''

_MAIN_HEAD = '''
@triton.jit
def pod_attention(
    q_ptr, k_cache_ptr, v_cache_ptr, sinks_ptr, out_ptr, partial_ptr, stats_ptr,
    cu_seqlens_ptr, kv_lens_ptr, block_table_ptr, items_ptr, counts_ptr, counters_ptr, sm_order_ptr,
    q_stride_t, q_stride_h, table_stride, decode_base, scale, softcap, prefill_share, decode_share, one,
):
    """@DOC@"""
    prefills = tl.load(counts_ptr) * KV_HEADS
    decodes = tl.load(counts_ptr + 1) * KV_HEADS
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

_TICKET = """
ticket = tl.atomic_add(counters_ptr + TICKETS + sm, 1)
role, index = draw(
    counters_ptr, ticket % (prefill_share + decode_share) >= prefill_share, prefills, decodes
)
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
if program < prefills + decodes:
{draw}
{run}
"""
_RESET = """
# The last program to finish leaves the counters as it found them: zero.
finished = tl.atomic_add(counters_ptr + 2, 1)
if finished == tl.num_programs(0) - 1:
    tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
"""

_DOCS = {
    "tickets": "One item a program: an SM's programs take roles in turn by the tickets of their SM.",
    "persistent": "Resident programs draw items until none is left, in roles by the tickets of their SM.",
    "partition": "Some SMs begin with prefill, the others with decode; who runs dry takes over.",
}


def _indent(text: str, by: int) -> str:
    pad = " " * by
    return "\n".join(pad + line if line else line for line in text.strip("\n").split("\n"))


def _main(spec: AttentionSpec) -> str:
    sm = "smid() % MAX_SMS" if spec.smid else "tl.load(sm_order_ptr + program) % MAX_SMS"
    head = _MAIN_HEAD.replace("@SM@", sm).replace("@DOC@", _DOCS[spec.scheduler])
    run = _RUN_UNIFORM if spec.uniform else _RUN
    if spec.scheduler == "tickets":
        body = _ONCE.format(draw=_indent(_TICKET, 4), run=_indent(run, 4))
    else:
        draw = (_TICKET if spec.scheduler == "persistent" else _SIDE).strip("\n")
        body = _LOOP.format(draw=draw, run=_indent(run, 8), again=_indent(draw, 4))
    return head.rstrip("\n") + "\n" + _indent(body, 4) + "\n" + _indent(_RESET, 4)


def emit(spec: AttentionSpec) -> str:
    """The file of one specialisation; its kernel is ``pod_attention``."""
    constants = {
        **spec.constants(),
        "PREFILL_ROWS": spec.rows,
        "SPLIT_ROWS": spec.decode_rows,
        "KEYS": spec.keys,
        "STAGES": spec.stages,
        "COUNTERS": COUNTERS,
        "TICKETS": _FIRST_TICKET,
        "MAX_SMS": COUNTERS - _FIRST_TICKET,
        "LOG2E": 1.4426950408889634,
    }
    pages = _ONE_PAGE if spec.page % spec.keys == 0 else _PAGE_OF_EACH_KEY
    tile = _TILE.replace("@PAGES@", pages.strip("\n"))
    tile = tile.replace("@SCORE@", (_SCALE_AND_CAP if spec.softcap else _SCALE).strip("\n"))
    return module(
        "Prefill and decode attention over paged keys and values in one launch",
        spec.subject(),
        constants,
        fragments.FOLD,
        fragments.finish(spec.sinks),
        tile,
        _DRAW,
        _main(spec),
        imports="from triton.language.extra.cuda import smid\n" if spec.smid else "",
    )
