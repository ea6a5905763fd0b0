"""``llm42::pod_varlen_attention``: hybrid attention over keys and values that stand token by token.

The layout of ``torch_attn::_varlen_attn``: packed rows ``[Tk, Hkv, D]``, or a pool of pages
``[pages, page, Hkv, D]``. Nothing is written. For equal keys the bits are those of ``paged_attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm42c.codegen.operator import operator
from llm42c.codegen.ops.paged_attention import paged_attention
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


@operator(orders={"cpu": SPLITS, "cuda": GPU_SPLITS})
def pod_varlen_attention(
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
    decode_workers: int = 0,
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
        decode_workers: as in ``pod_attention``.

    Returns:
        ``[T, Hq, D]`` in fp64; the operator returns the dtype of ``q``.

    Raises:
        ValueError, TypeError: (the operator) shapes, dtypes or metadata that do not fit together.
    """
    if block_table is None:
        begins = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        (k, block_table), (v, _) = (_as_pages(x, kv_lens, begins) for x in (k, v))
    nothing = torch.full((q.shape[0],), -1, dtype=torch.int64)
    unused = q.new_zeros(q.shape[0], k.shape[2], q.shape[2])
    return paged_attention.reference(
        q,
        unused,
        unused,
        k.permute(0, 2, 3, 1),
        v.transpose(1, 2),
        nothing,
        cu_seqlens_q,
        kv_lens,
        block_table,
        scale,
        window,
        softcap,
        sinks,
    )


@pod_varlen_attention.fake
def _fake(
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
    decode_workers: int = 0,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
