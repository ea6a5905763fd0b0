"""The work list of hybrid attention, from lengths alone."""

import triton
import triton.language as tl

SPLIT = tl.constexpr(512)  # keys that are reduced together
WINDOW = tl.constexpr(0)  # keys that a row sees; 0: all
PREFILL_TOKENS = tl.constexpr(16)  # tokens of a prefill tile
DECODE_TOKENS = tl.constexpr(4)  # a sequence with at most as many is split over its keys
LANES = tl.constexpr(64)


@triton.jit(do_not_specialize=["cu_seqlens_ptr", "kv_lens_ptr", "sequences", "decode_base", "slots"])
def attention_plan(
    cu_seqlens_ptr, kv_lens_ptr, items_ptr, plan_ptr, counts_ptr, sequences, decode_base, slots,
    SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Program s writes the items of sequence s; sequences with more keys come first.

    An item is (sequence, first token, split or -1, slot of the partial result). plan[s] is (first slot,
    number of splits) of a decoding sequence, (0, 0) of another. counts is (prefill items, decode items).
    A sequence whose partial results would not fit into the slots is one item; its bits are the same.
    """
    mine = tl.program_id(0)
    other = tl.arange(0, SEQUENCES)
    there = other < sequences
    q_end = tl.load(cu_seqlens_ptr + other + 1, mask=there, other=0)
    q_len = q_end - tl.load(cu_seqlens_ptr + other, mask=there, other=0)  # [S]
    kv_len = tl.load(kv_lens_ptr + other, mask=there, other=0)
    decodes = (q_len > 0) & (q_len <= DECODE_TOKENS)
    begin = tl.maximum(kv_len - q_len - WINDOW + 1, 0) if WINDOW > 0 else tl.zeros_like(kv_len)
    splits = tl.where(decodes, (kv_len + SPLIT - 1) // SPLIT - begin // SPLIT, 0)
    splits = tl.where(tl.cumsum(splits, 0) <= slots, splits, tl.minimum(splits, 1))
    tiles = tl.where(decodes, 0, (q_len + PREFILL_TOKENS - 1) // PREFILL_TOKENS)

    is_mine = other == mine
    my_len = tl.sum(tl.where(is_mine, kv_len, 0), 0)
    my_splits = tl.sum(tl.where(is_mine, splits, 0), 0)
    my_tiles = tl.sum(tl.where(is_mine, tiles, 0), 0)
    my_first = tl.sum(tl.where(is_mine, begin // SPLIT, 0), 0)
    ahead = (kv_len > my_len) | ((kv_len == my_len) & (other < mine))
    decode_at = decode_base + tl.sum(tl.where(ahead, splits, 0), 0)
    tile_at = tl.sum(tl.where(ahead, tiles, 0), 0)
    slot = tl.sum(tl.where(other < mine, splits, 0), 0)
    tl.store(plan_ptr + mine * 2, slot)
    tl.store(plan_ptr + mine * 2 + 1, my_splits)
    if mine == 0:
        tl.store(counts_ptr, tl.sum(tiles, 0))
        tl.store(counts_ptr + 1, tl.sum(splits, 0))

    lane = tl.arange(0, LANES)
    for start in tl.range(0, my_splits, LANES):
        i = start + lane
        item = items_ptr + (decode_at + i) * 4
        written = i < my_splits
        tl.store(item, mine + i * 0, mask=written)
        tl.store(item + 1, i * 0, mask=written)
        tl.store(item + 2, tl.where(my_splits > 1, my_first + i, -1), mask=written)
        tl.store(item + 3, slot + i, mask=written)
    for start in tl.range(0, my_tiles, LANES):
        i = start + lane
        item = items_ptr + (tile_at + i) * 4
        written = i < my_tiles
        tl.store(item, mine + i * 0, mask=written)
        tl.store(item + 1, (my_tiles - 1 - i) * PREFILL_TOKENS, mask=written)  # the last tile has most keys
        tl.store(item + 2, i * 0 - 1, mask=written)
        tl.store(item + 3, i * 0, mask=written)
