"""``llm42::pod_dense_attention``: two independent calls of ``dense_attention`` at once.

Engines that split a batch call attention twice, for the prefills and for the decodes. Each result has the
bits of its own call of ``dense_attention``; only who computes what, and when, differs.
"""

from __future__ import annotations

from torch import Tensor

from llm42c.codegen.operator import operator
from llm42c.codegen.ops.dense_attention import dense_attention
from llm42c.codegen.order import GPU_SPLITS, SPLITS


@operator(orders={"cpu": SPLITS, "cuda": GPU_SPLITS})
def pod_dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    decode_q: Tensor,
    decode_k: Tensor,
    decode_v: Tensor,
    decode_mask: Tensor | None,
    decode_scale: float,
    decode_causal: bool,
    decode_window: int,
    decode_softcap: float,
    decode_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Specification: ``dense_attention`` of the first eight arguments and of the next eight.

    ``q: [B, Hq, Sq, D]``, ``decode_q: [B', Hq', 1, D']``; shapes need not agree, dtypes must.
    ``decode_workers`` threads begin with the decodes; with 0, all begin with the prefills. Raises as
    ``dense_attention``.
    """
    return (
        dense_attention.reference(q, k, v, mask, scale, causal, window, softcap),
        dense_attention.reference(
            decode_q,
            decode_k,
            decode_v,
            decode_mask,
            decode_scale,
            decode_causal,
            decode_window,
            decode_softcap,
        ),
    )


@pod_dense_attention.fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    decode_q: Tensor,
    decode_k: Tensor,
    decode_v: Tensor,
    decode_mask: Tensor | None,
    decode_scale: float,
    decode_causal: bool,
    decode_window: int,
    decode_softcap: float,
    decode_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    return (
        dense_attention.meta(q, k, v, mask, scale, causal, window, softcap),
        dense_attention.meta(
            decode_q,
            decode_k,
            decode_v,
            decode_mask,
            decode_scale,
            decode_causal,
            decode_window,
            decode_softcap,
        ),
    )
