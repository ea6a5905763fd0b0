"""``llm42::paged_attention``: causal attention of a packed ragged batch over paged keys and values.

A batch may hold prefills and decodes; they run side by side, in one launch (POD-Attention, Kamath et al.,
ASPLOS 2025). Who computes what is the target's choice, made for a step (``Target.step``); it changes no bit.

On a CPU prefill is bound by arithmetic and decode, on many cores, by memory: in a step about as many threads
as fill the memory begin with decodes, while the others begin with prefills; who finds nothing left takes over
the other kind. Each kind goes longest first. Outside of a step there is one queue for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.examples import Numbers
from llm42c.codegen.operator import operator
from llm42c.codegen.order import GPU_SPLITS, SPLITS
from llm42c.codegen.simulate_attention import Heads, attend


def write_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Put the keys and values of ``T`` tokens into their slots.

    Args:
        k, v: ``[T, Hkv, D]``.
        k_cache: ``[pages, Hkv, D, page]``, written in place.
        v_cache: ``[pages, Hkv, page, D]``, written in place.
        slot_mapping: ``[T]`` int64, ``page_id * page + offset``; -1 writes nothing.
    """
    page = k_cache.shape[3]
    kept = slot_mapping >= 0
    pages, offsets = slot_mapping[kept] // page, slot_mapping[kept] % page
    k_cache[pages, :, :, offsets] = k[kept]
    v_cache[pages, :, offsets, :] = v[kept]


def _sequences(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    window: int,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(rows, k and v: [Hq, keys, D], hidden: [rows, keys]) of each sequence that has rows."""
    heads = torch.arange(q.shape[1]) // (q.shape[1] // k_cache.shape[1])  # KV head of each query head
    for s in range(len(kv_lens)):
        begin, end, keys = int(cu_seqlens_q[s]), int(cu_seqlens_q[s + 1]), int(kv_lens[s])
        if begin == end:
            continue
        pages = block_table[s, : -(-keys // k_cache.shape[3])].long()
        ks = k_cache[pages].permute(1, 0, 3, 2).flatten(1, 2)[heads, :keys]
        vs = v_cache[pages].permute(1, 0, 2, 3).flatten(1, 2)[heads, :keys]
        position = torch.arange(keys - (end - begin), keys)[:, None]
        key = torch.arange(keys)
        hidden = key > position
        if window > 0:
            hidden = hidden | (key <= position - window)
        yield slice(begin, end), ks, vs, hidden


def example_rows(r: Numbers, length: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """q: [length, 6, 40], k, v: [length, 2, 40]: more than one split."""
    q, k, v = (r(length, heads, 40, scale=2.0) for heads in (6, 2, 2))
    return q, k, v


def examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    """One sequence over pages in descending order: all positions but one, then a decode of the last."""
    q, k, v = example_rows(r)
    page, length = 16, len(q)
    pages = -(-length // page)
    table = torch.arange(pages - 1, -1, -1, dtype=torch.int32)[None]
    place = torch.arange(length)
    slots = table[0, place // page].long() * page + place % page
    for window, softcap, sinks in ((0, 0.0, None), (40, 2.0, r(6).float())):
        for begin, end in ((0, length - 1), (length - 1, length)):
            k_cache, v_cache = q.new_zeros(pages, 2, 40, page), q.new_zeros(pages, 2, page, 40)
            write_cache(k[:begin], v[:begin], k_cache, v_cache, slots[:begin])
            rows, cu, seen = slice(begin, end), torch.tensor([0, end - begin]), torch.tensor([end])
            batch = (slots[rows], cu.int(), seen.int(), table, 0.15, window, softcap, sinks)
            yield q[rows], k[rows], v[rows], k_cache, v_cache, *batch


@operator(orders={"cpu": SPLITS, "cuda": GPU_SPLITS}, mutates=("k_cache", "v_cache"), examples=examples)
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Specification: writes the caches, then attends in fp64, one sequence at a time.

    Args:
        q: ``[T, Hq, D]``; rows from ``cu_seqlens_q[-1]`` on are padding and give 0.
        k, v: ``[T, Hkv, D]`` of the same tokens, already rotated; ``Hkv`` divides ``Hq``.
        k_cache: ``[pages, Hkv, D, page]``; ``page`` a multiple of 16. Keys are stored transposed.
        v_cache: ``[pages, Hkv, page, D]``.
        slot_mapping: ``[T]`` int64, ``page_id * page + offset``; -1: not written.
        cu_seqlens_q: ``[S + 1]`` int32. A sequence may have no rows.
        kv_lens: ``[S]`` int32, keys of a sequence including those of this call. Row ``i`` of a sequence
            with ``n`` rows stands at position ``kv_lens[s] - n + i`` and sees the positions up to its own.
        block_table: ``[S, P]`` int32, the pages of a sequence in order.
        scale: multiplies the scores.
        window: if positive, a row sees the last ``window`` positions only, its own included.
        softcap: if positive, scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[Hq]`` or None, one more score per head, with no value.

    Returns:
        ``[T, Hq, D]`` in fp64. The operator itself returns the dtype of ``q``.

    Raises:
        ValueError, TypeError: (the operator) shapes, dtypes or metadata that do not fit together; nothing
            has been written then. On a GPU metadata is trusted (:func:`check_metadata`): wrong pages read
            wrong memory.

    All rows of all sequences are written before any row attends, so sequences may share pages.
    """
    write_cache(k, v, k_cache, v_cache, slot_mapping)
    out = torch.zeros(q.shape, dtype=torch.float64)
    sequences = _sequences(q, k_cache, v_cache, cu_seqlens_q, kv_lens, block_table, window)
    for rows, ks, vs, hidden in sequences:
        scores = torch.einsum("thd,hkd->htk", q[rows].double(), ks.double()) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[rows] = torch.einsum("htk,hkd->thd", weights, vs.double())
    return out


@paged_attention.simulator(SPLITS)
def simulated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    write_cache(k, v, k_cache, v_cache, slot_mapping)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    sequences = _sequences(q, k_cache, v_cache, cu_seqlens_q, kv_lens, block_table, window)
    for rows, ks, vs, hidden in sequences:
        visible = ~hidden.expand(q.shape[1], -1, -1)
        attended = attend(q[rows].transpose(0, 1), ks, vs, visible, Heads(scale, softcap), sinks=sinks)
        out[rows] = attended.transpose(0, 1).to(q.dtype)
    return out


@paged_attention.fake
def _fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def check_metadata(
    pages: int,
    page: int,
    tokens: int,
    slot_mapping: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
) -> None:
    """Reads the metadata of a call back to the host and raises ValueError for what does not fit.

    For devices that trust it. Shapes as in ``paged_attention``. Pages of a sequence must lie in the cache,
    its keys in its pages, its rows among its keys, and every slot to be written in the cache.
    """
    sequences = kv_lens.shape[0]
    if cu_seqlens_q.shape != (sequences + 1,) or block_table.dim() != 2 or block_table.shape[0] != sequences:
        raise ValueError(
            "expected cu_seqlens_q [S + 1], kv_lens [S], block_table [S, P], got "
            f"{tuple(cu_seqlens_q.shape)}, {tuple(kv_lens.shape)}, {tuple(block_table.shape)}"
        )
    cu, lens, table = cu_seqlens_q.tolist(), kv_lens.tolist(), block_table.cpu()
    if cu[0] != 0 or cu[-1] > tokens:
        raise ValueError(f"cu_seqlens_q goes from {cu[0]} to {cu[-1]}, but there are {tokens} rows")
    for s in range(sequences):
        rows = cu[s + 1] - cu[s]
        if rows < 0:
            raise ValueError(f"cu_seqlens_q must not decrease, but sequence {s} has {rows} rows")
        if rows == 0:
            continue
        if lens[s] < rows:
            raise ValueError(f"kv_lens[{s}] = {lens[s]} is less than the {rows} rows of the sequence")
        if lens[s] > table.shape[1] * page:
            raise ValueError(f"kv_lens[{s}] = {lens[s]} is more than {table.shape[1]} pages of {page} hold")
        used = table[s, : -(-lens[s] // page)]
        wrong = (used < 0) | (used >= pages)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(f"block_table[{s}, {i}] = {int(used[i])} is no page of a cache of {pages}")
    slots = slot_mapping.cpu()
    outside = (slots < -1) | (slots >= pages * page)
    if outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"slot_mapping[{i}] = {int(slots[i])} is neither -1 nor a slot of {pages} pages of {page}"
        )
