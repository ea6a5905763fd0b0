"""``llm42::varlen_attention``: as ``paged_attention``, over keys and values that stand token by token.

The layout of ``torch_attn::_varlen_attn``: packed rows ``[Tk, Hkv, D]``, or a pool of pages
``[pages, page, Hkv, D]``. Nothing is written. For equal keys the bits are those of ``paged_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.examples import Numbers
from llm42c.codegen.operator import operator
from llm42c.codegen.ops.paged_attention import example_rows, paged_attention, simulated
from llm42c.codegen.order import GPU_SPLITS, SPLITS


def _as_pages(x: Tensor, kv_lens: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[Tk, Hkv, D]`` as pages of 16 tokens ``[pages, 16, Hkv, D]`` with their block table."""
    widths = [-(-int(n) // 16) for n in kv_lens]
    table = torch.zeros(len(widths), max(widths, default=0), dtype=torch.int32)
    pool = x.new_zeros(sum(widths), 16, *x.shape[1:])
    first = 0
    for s, width in enumerate(widths):
        begin, keys = int(cu_seqlens_k[s]), int(kv_lens[s])
        pool[first : first + width].flatten(0, 1)[:keys] = x[begin : begin + keys]
        table[s, :width] = torch.arange(first, first + width)
        first += width
    return pool, table


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    """Two sequences of packed rows, 20 and 280; then a decode over pages of 16."""
    q, k, v = example_rows(r)
    cu, lengths = torch.tensor([0, 20, 300]).int(), torch.tensor([20, 280]).int()
    yield q, k, v, cu, lengths, cu, None, 0.15, 40, 2.0, r(6).float()
    pool = [x[:288].view(18, 16, 2, 40) for x in (k, v)]
    cu, lengths, table = torch.tensor([0, 1]).int(), torch.tensor([270]).int(), torch.arange(18).int()[None]
    yield q[:1], *pool, cu, lengths, None, table.flip(1), 0.15, 0, 0.0, None


@operator(orders={"cpu": SPLITS, "cuda": GPU_SPLITS}, examples=_examples)
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Specification: ``paged_attention``'s, without its writing.

    Args:
        q: ``[T, Hq, D]``; rows from ``cu_seqlens_q[-1]`` on are padding and give 0.
        k, v: ``[Tk, Hkv, D]`` with ``cu_seqlens_k``, or ``[pages, page, Hkv, D]`` with ``block_table`` and
            ``page`` a multiple of 16; any strides with contiguous ``D``.
        cu_seqlens_q: ``[S + 1]`` int32.
        kv_lens: ``[S]`` int32. Row ``i`` of a sequence with ``n`` rows stands at ``kv_lens[s] - n + i`` and
            sees the positions up to its own.
        cu_seqlens_k: ``[S + 1]`` int32; keys of a sequence begin at row ``cu_seqlens_k[s]``.
        block_table: ``[S, P]`` int32; exactly one of the two is given.
        scale, window, softcap, sinks: as in ``paged_attention``.

    Returns:
        ``[T, Hq, D]`` in fp64; the operator returns the dtype of ``q``.

    Raises:
        ValueError, TypeError: (the operator) shapes, dtypes or metadata that do not fit together.
    """
    paged = _paged(q, k, v, cu_seqlens_q, kv_lens, cu_seqlens_k, block_table)
    return paged_attention.reference(*paged, scale, window, softcap, sinks)


def _paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
) -> tuple[Any, ...]:
    """The tensors of ``paged_attention`` that mean the same; nothing is written."""
    if block_table is None:
        begins = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        (k, block_table), (v, _) = (_as_pages(x, kv_lens, begins) for x in (k, v))
    nothing = torch.full((q.shape[0],), -1, dtype=torch.int64)
    unused = q.new_zeros(q.shape[0], k.shape[2], q.shape[2])
    caches = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    return q, unused, unused, *caches, nothing, cu_seqlens_q, kv_lens, block_table


@varlen_attention.simulator(SPLITS)
def _simulated(*args: Any) -> Tensor:
    return simulated(*_paged(*args[:7]), *args[7:])


@varlen_attention.fake
def _fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
