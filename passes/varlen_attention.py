"""Torch's attention of packed sequences becomes ``llm42::varlen_attention``.

Cases: ``torch_attn::_varlen_attn``, causal, with or without a sliding window,

1. over its own tokens (the same ``cu_seq`` for queries and keys)
2. over other keys (``cu_seq_k``, ``seqused_k``)
3. over a pool of pages [pages, page, Hkv, D] (``block_table`` and ``seqused_k``)

Not rewritten: windows to the right; users of the log-sum-exp; pages of a size that is unknown or no multiple
of 16; graphs that will be differentiated.

Before and after, case 3 (q: [T, Hq, D], pool_k, pool_v: [pages, page, Hkv, D])::

    y, lse, rng = torch_attn._varlen_attn(q, pool_k, pool_v, cu, cu_k, max_q, max_k, True, s,
                                          seqused_k=lens, block_table=table)
                                     ↓
    y = llm42.varlen_attention(q, pool_k, pool_v, cu, lens, None, table, s, 0, 0.0, None)   # [T, Hq, D]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport, usable

PAGE = 16  # tokens that must not lie in different pages


def varlen_attention(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Rewrite all cases."""
    for node in list(graph.nodes):
        if "_varlen_attn" in str(node.target) and node.op == "call_function":
            _rewrite(node, ctx, report)


def _rewrite(node: fx.Node, ctx: Context, report: PassReport) -> None:
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale",
             "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits")  # fmt: skip
    bound: dict[str, Any] = {
        **dict.fromkeys(names),
        **dict(zip(names, node.args, strict=False)),
        **node.kwargs,
    }
    reason = _refusal(node, bound) or usable(ctx, "varlen_attention")
    if reason is not None:
        report.miss(node, reason)
        return
    report.match(node)
    left = (bound["window_size"] or (-1, 0))[0]
    scale = g.number(bound["scale"])
    scale = 1 / math.sqrt(int(g.fake(bound["query"]).shape[-1])) if scale is None else scale
    new = _replacement(node, bound, scale, left + 1 if left >= 0 else 0)
    for user in list(node.users):
        g.replace(user, new)
    if not node.users:
        node.graph.erase_node(node)


def _refusal(node: fx.Node, bound: dict[str, Any]) -> str | None:
    if any(g.name(u) != "getitem" or u.args[1] != 0 for u in node.users) or len(node.users) != 1:
        return "the log-sum-exp is used"
    if not bound["is_causal"] and (bound["window_size"] or (-1, -1))[1] != 0:
        return "not causal"
    if g.fake(bound["query"]).shape[-1] % 8 != 0:
        return f"head_dim {g.fake(bound['query']).shape[-1]} is no multiple of 8"
    if bound["block_table"] is None:
        return None if bound["cu_seq_k"] is not None else "where the keys of a sequence begin is not given"
    if bound["seqused_k"] is None:
        return "how many keys of its pages a sequence has is not given"
    page = g.fake(bound["key"]).shape[1]
    return None if isinstance(page, int) and page % PAGE == 0 else f"pages of {page} tokens"


def _replacement(node: fx.Node, bound: dict[str, Any], scale: float, window: int) -> fx.Node:
    cu_k, lens, table = bound["cu_seq_k"], bound["seqused_k"], bound["block_table"]
    if lens is None:
        ends = g.insert(node, g.FUNCTIONS["narrow"], (cu_k, 0, 1, _length(cu_k)))
        begins = g.insert(node, g.FUNCTIONS["narrow"], (cu_k, 0, 0, _length(cu_k)))
        lens = g.insert(node, g.FUNCTIONS["sub"], (ends, begins))
    place = (None, table) if table is not None else (cu_k, None)
    tensors = (bound["query"], bound["key"], bound["value"], bound["cu_seq_q"], lens, *place)
    args = (*tensors, scale, window, 0.0, None)
    return g.insert(node, torch.ops.llm42.varlen_attention.default, args, like=node)


def _length(cu_seqlens: fx.Node) -> int:
    return int(g.fake(cu_seqlens).shape[0]) - 1
