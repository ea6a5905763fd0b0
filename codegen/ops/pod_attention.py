"""``llm42::pod_attention``: paged attention of a hybrid batch, prefill and decode in one launch.

It computes what ``paged_attention`` computes, with the same bits on the same target; it runs the work of
prefills and decodes side by side (POD-Attention, Kamath et al., ASPLOS 2025). Which batches gain is known at
run time only, so pure prefill and pure decode batches are dispatched inside.

On a CPU prefill is bound by arithmetic and decode, on many cores, by memory: ``decode_workers`` threads,
about as many as fill the memory, begin with decodes, while the others begin with prefills; who finds nothing
left takes over the other kind. Each kind goes longest first. ``decode_workers=0`` is one queue for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.examples import Numbers
from llm42c.codegen.operator import operator
from llm42c.codegen.ops import paged_attention as paged
from llm42c.codegen.ops.paged_attention import paged_attention
from llm42c.codegen.order import GPU_SPLITS, SPLITS


def check_metadata(
    pages: int,
    page: int,
    tokens: int,
    slot_mapping: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
) -> None:
    """The checked mode: reads the metadata back to the host and raises ValueError for what does not fit.

    Shapes as in ``paged_attention``. Pages of a sequence must lie in the cache, its keys in its pages, its
    rows among its keys, and every slot to be written in the cache.
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


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    for example in paged.examples(r):
        yield *example, False, 1


@operator(orders={"cpu": SPLITS, "cuda": GPU_SPLITS}, mutates=("k_cache", "v_cache"), examples=_examples)
def pod_attention(
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
    checked: bool,
    decode_workers: int = 0,
) -> Tensor:
    """``paged_attention``'s specification. ``checked`` reads metadata back and raises ValueError.

    Without ``checked``, metadata on a GPU is trusted: wrong pages read wrong memory. A CPU always checks.
    ``decode_workers`` chooses who computes what, on a CPU, and nothing else.
    """
    if checked:
        pages, page = k_cache.shape[0], k_cache.shape[3]
        check_metadata(pages, page, q.shape[0], slot_mapping, cu_seqlens_q, kv_lens, block_table)
    return paged_attention.reference(
        q,
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        cu_seqlens_q,
        kv_lens,
        block_table,
        scale,
        window,
        softcap,
        sinks,
    )


@pod_attention.fake
def _fake(
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
    checked: bool,
    decode_workers: int = 0,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@pod_attention.simulator(SPLITS)
def _simulated(*args: Any) -> Tensor:
    return paged.simulated(*args[:13])
