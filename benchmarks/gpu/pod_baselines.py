"""Attention kernels of others on the batches of pod.py: torch's SDPA, FlexAttention and varlen, FlashInfer.

Each takes a batch of one prefill and several decodes of one length, with its keys and values as that kernel
wants them, and gives a call whose result is [T, H, D]. Copies are made before the call. What a version does
not have raises, and becomes a row that says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pod import Batch

Call = Callable[[], Tensor]


def dense(b: Batch, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of one length, contiguous: q [B, H, n, D], k and v [B, Hkv, keys, D]."""
    keys, n, page = b.keys[begin], b.rows[begin], b.v_cache.shape[2]
    pages = b.table[begin:end, : -(-keys // page)].long()
    k = b.k_cache[pages].permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :keys].contiguous()
    v = b.v_cache[pages].permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :keys].contiguous()
    q = b.q[sum(b.rows[:begin]) : sum(b.rows[:end])]
    return q.view(end - begin, n, *q.shape[1:]).transpose(1, 2).contiguous(), k, v


def rows_of(out: Tensor) -> Tensor:
    """[B, H, n, D] → [B n, H, D]."""
    return out.transpose(1, 2).flatten(0, 1)


def sdpa(b: Batch, scale: float, dry: bool) -> Call:
    """The prefill in one call, all decodes in another: a serial pair, without the cost of pages."""
    from torch.nn.attention.bias import causal_lower_right

    prefill, decode = dense(b, 0, 1), dense(b, 1, len(b.rows))
    mask: Any = causal_lower_right(b.rows[0], b.keys[0])
    # The mask's own kernels take no groups of query heads.
    group = prefill[0].shape[1] // prefill[1].shape[1]
    q, k, v = prefill[0], *(x.repeat_interleave(group, 1) for x in prefill[1:])

    def call() -> Tensor:
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        rest = F.scaled_dot_product_attention(*decode, scale=scale, enable_gqa=True)
        return torch.cat([rows_of(first), rows_of(rest)])

    return call


def flex(b: Batch, scale: float, dry: bool) -> Call:
    """FlexAttention as the same pair, compiled; its masks are made beforehand, as an engine would."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    prefill, decode = dense(b, 0, 1), dense(b, 1, len(b.rows))
    n, keys = b.rows[0], b.keys[0]

    def causal(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + (keys - n)

    mask = create_block_mask(causal, None, None, n, keys, device=str(b.q.device))
    run: Any = flex_attention if dry else torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        first = run(*prefill, block_mask=mask, scale=scale, enable_gqa=True)
        rest = run(*decode, scale=scale, enable_gqa=True)
        return torch.cat([rows_of(first), rows_of(rest)])

    return call


def varlen(b: Batch, scale: float, dry: bool) -> Call:
    """One call of torch's varlen attention (FlashAttention) over packed rows of keys."""
    from torch.nn.attention.varlen import varlen_attn

    parts = [dense(b, 0, 1), dense(b, 1, len(b.rows))]
    k, v = (torch.cat([rows_of(part[i]) for part in parts]) for i in (1, 2))
    known: Any = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scale} if "scale" in known else {}
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        group = b.q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    cu_k = torch.tensor([0, *b.keys], device=b.q.device).cumsum(0).int()
    lengths = max(b.rows), max(b.keys)
    run: Any = varlen_attn
    return lambda: run(b.q, k, v, b.cu, cu_k, *lengths, **options)


def flashinfer_pod(b: Batch, scale: float, dry: bool) -> Call:
    """FlashInfer's POD: one contiguous prefill and paged decodes in one kernel."""
    import flashinfer

    if b.rows.count(1) != len(b.rows) - 1:
        raise ValueError("this wrapper takes one prefill")
    heads, kv_heads, dim, page = *b.q.shape[1:2], *b.v_cache.shape[1:2], b.q.shape[2], b.v_cache.shape[2]
    q, k, v = (rows_of(x) for x in dense(b, 0, 1))
    decodes = b.part(1, len(b.rows))
    pages = [-(-n // page) for n in decodes.keys]
    indptr = torch.tensor([0, *pages], device=q.device).cumsum(0).int()
    indices = torch.cat([decodes.table[s, :n] for s, n in enumerate(pages)])
    last = torch.tensor([(n - 1) % page + 1 for n in decodes.keys], dtype=torch.int32, device=q.device)
    caches = b.k_cache.transpose(2, 3).contiguous(), b.v_cache  # HND
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.PODWithPagedKVCacheWrapper(workspace, "HND")
    dtypes = {"q_data_type": q.dtype, "kv_data_type": q.dtype}
    wrapper.plan(indptr, indices, last, heads, kv_heads, dim, page, sm_scale=scale, **dtypes)

    def call() -> Tensor:
        both = wrapper.run(q, k, v, decodes.q, caches, causal_p=True, sm_scale_p=scale, sm_scale_d=scale)
        return torch.cat(both)

    return call


SERIAL: dict[str, Callable[[Batch, float, bool], Call]] = {
    "torch SDPA, two calls": sdpa,
    "torch FlexAttention, two calls": flex,
}
TOGETHER: dict[str, Callable[[Batch, float, bool], Call]] = {
    "torch varlen, one call": varlen,
    "FlashInfer POD": flashinfer_pod,
}
