"""``llm42::pod_dense_attention``: two independent calls of ``dense_attention`` at once.

Engines that split a batch call attention twice, for the prefills and for the decodes. Each result has the
bits of its own call of ``dense_attention``; only who computes what, and when, differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.examples import Numbers
from llm42c.codegen.operator import operator
from llm42c.codegen.ops.dense_attention import dense_attention, simulated
from llm42c.codegen.order import GPU_SPLITS, SPLITS


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    """A prefill under a mask that is added, with padding on the left; decodes of three sequences."""
    prefill = r(2, 4, 33, 24), r(2, 2, 33, 24), r(2, 2, 33, 24)
    mask = torch.zeros(2, 1, 33, 33).index_fill(3, torch.arange(3), -torch.inf)
    decode = r(3, 4, 1, 40), r(3, 2, 290, 40), r(3, 2, 290, 40)
    seen = torch.arange(290) < torch.tensor([5, 258, 290])[:, None, None, None]
    yield *prefill, mask, 0.2, True, 0, 0.0, *decode, seen, 0.15, False, 40, 2.0, 1


@operator(orders={"cpu": SPLITS, "cuda": GPU_SPLITS}, examples=_examples)
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


@pod_dense_attention.simulator(SPLITS)
def _simulated(*args: Any) -> tuple[Tensor, Tensor]:
    return simulated(*args[:8]), simulated(*args[8:16])
