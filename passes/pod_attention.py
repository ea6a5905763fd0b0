"""Hybrid attention becomes one of the ``llm42::pod_...`` operators.

Whether a batch is hybrid is known at run time only; the operators dispatch inside.

Cases:

1. ``llm42::paged_attention`` (packed graphs)
2. ``torch_attn::_varlen_attn``, causal, with or without a sliding window
   a. over its own tokens (the same ``cu_seq`` for queries and keys)
   b. over other keys (``cu_seq_k``, ``seqused_k``)
   c. over a pool of pages [pages, page, Hkv, D] (``block_table`` and ``seqused_k``)
3. two calls of ``llm42::dense_attention``, which is what SDPA and eager attention have become by then: a
   prefill [B, Hq, S, D] with S > 1 and a decode [B', Hq', 1, D'] that do not depend on each other

On a GPU there is one operator, over pages whose keys are transposed: case 2a goes through pages made for the
call, 2b, 2c and 3 would copy whole caches and are left alone. On a CPU all three read what is there.

Not rewritten: windows to the right; users of the log-sum-exp; pages of a size that is unknown or no multiple
of 16; calls of which one's result is needed before the other can run; caches that are written between the
two calls; graphs that will be differentiated. Case 3 needs no proof about masks: each call keeps its own.

Before and after, case 1::

    y = llm42.paged_attention(q, k, v, kc, vc, slots, cu, lens, table, s, w, c, sinks)      # [T, Hq, D]
                                     ↓
    y = llm42.pod_attention(q, k, v, kc, vc, slots, cu, lens, table, s, w, c, sinks, False, workers)

Case 2c (q: [T, Hq, D], pool_k, pool_v: [pages, page, Hkv, D])::

    y, lse, rng = torch_attn._varlen_attn(q, pool_k, pool_v, cu, cu_k, max_q, max_k, True, s,
                                          seqused_k=lens, block_table=table)
                                     ↓
    y = llm42.pod_varlen_attention(q, pool_k, pool_v, cu, lens, None, table, s, 0, 0.0, None, workers)

Case 3 (q_p: [B, Hq, S, D], k_p, v_p: [B, Hkv, L, D], q_d: [B', Hq, 1, D], k_d, v_d: [B', Hkv, M, D])::

    y_p = llm42.dense_attention(q_p, k_p, v_p, None, s, True, 0, 0.0)
    y_d = llm42.dense_attention(q_d, k_d, v_d, mask, s, False, 0, 0.0)
                                     ↓
    y_p, y_d = llm42.pod_dense_attention(q_p, k_p, v_p, None, s, True, 0, 0.0,
                                         q_d, k_d, v_d, mask, s, False, 0, 0.0, workers)

``workers``: ``Context.decode_workers``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport, usable

PAGE = 16  # tokens that must not lie in different pages


def pod_attention(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Rewrite all cases, on the device of the tensors."""
    for node in list(graph.nodes):
        if node.target is torch.ops.llm42.paged_attention.default:
            _paged(node, ctx, report)
        elif "_varlen_attn" in str(node.target) and node.op == "call_function":
            _varlen(node, ctx, report)
    _pairs(graph, ctx, report)


# Case 1.


def _paged(node: fx.Node, ctx: Context, report: PassReport) -> None:
    report.match(node)
    workers = (ctx.decode_workers,) if _on_cpu(node) else ()
    args = (*node.args, False, *workers)
    new = g.insert(node, torch.ops.llm42.pod_attention.default, args, dict(node.kwargs), like=node)
    g.replace(node, new)


def _on_cpu(node: fx.Node) -> bool:
    return g.fake(node.all_input_nodes[0]).device.type == "cpu"


# Case 2.


def _varlen(node: fx.Node, ctx: Context, report: PassReport) -> None:
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale",
             "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits")  # fmt: skip
    bound: dict[str, Any] = {
        **dict.fromkeys(names),
        **dict(zip(names, node.args, strict=False)),
        **node.kwargs,
    }
    reason = _varlen_refusal(node, bound) or (None if _on_cpu(node) else _gpu_refusal(bound))
    reason = reason or usable(ctx, "pod_varlen_attention")
    if reason is not None:
        report.miss(node, reason)
        return
    report.match(node)
    left = (bound["window_size"] or (-1, 0))[0]
    scale = g.number(bound["scale"])
    scale = 1 / math.sqrt(int(g.fake(bound["query"]).shape[-1])) if scale is None else scale
    options = (scale, left + 1 if left >= 0 else 0)
    new = _varlen_on_cpu(node, bound, options, ctx) if _on_cpu(node) else _varlen_on_gpu(node, bound, options)
    for user in list(node.users):
        g.replace(user, new)
    if not node.users:
        node.graph.erase_node(node)


def _varlen_refusal(node: fx.Node, bound: dict[str, Any]) -> str | None:
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


def _gpu_refusal(bound: dict[str, Any]) -> str | None:
    if bound["block_table"] is not None:
        return "the cache is laid out [pages, page, H, D]: on a GPU it would have to be copied"
    if bound["cu_seq_k"] is not bound["cu_seq_q"] or bound["seqused_k"] is not None:
        return "queries and keys are of different tokens"
    return None if isinstance(bound["max_k"], int) else "max_k is not known at compile time"


def _varlen_on_cpu(node: fx.Node, bound: dict[str, Any], options: tuple[float, int], ctx: Context) -> fx.Node:
    cu_k, lens, table = bound["cu_seq_k"], bound["seqused_k"], bound["block_table"]
    if lens is None:
        ends = g.insert(node, g.FUNCTIONS["narrow"], (cu_k, 0, 1, _length(cu_k)))
        begins = g.insert(node, g.FUNCTIONS["narrow"], (cu_k, 0, 0, _length(cu_k)))
        lens = g.insert(node, g.FUNCTIONS["sub"], (ends, begins))
    args = (bound["query"], bound["key"], bound["value"], bound["cu_seq_q"], lens)
    place = (None, table) if table is not None else (cu_k, None)
    args = (*args, *place, *options, 0.0, None, ctx.decode_workers)
    return g.insert(node, torch.ops.llm42.pod_varlen_attention.default, args, like=node)


def _length(cu_seqlens: fx.Node) -> int:
    return int(g.fake(cu_seqlens).shape[0]) - 1


def _varlen_on_gpu(node: fx.Node, bound: dict[str, Any], options: tuple[float, int]) -> fx.Node:
    args = (bound["query"], bound["key"], bound["value"], bound["cu_seq_q"], int(bound["max_k"]), *options)
    return g.insert(node, varlen_through_pages, args, like=node)


def varlen_through_pages(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    """q: [T, Hq, D], k, v: [T, Hkv, D], cu_seqlens: [S + 1] int32 → [T, Hq, D]; through own pages."""
    heads, dim = k.shape[1:]
    sequences, device = cu_seqlens.shape[0] - 1, q.device
    width = -(-longest // PAGE)
    k_cache = k.new_empty(sequences * width, heads, dim, PAGE)
    v_cache = v.new_empty(sequences * width, heads, PAGE, dim)
    token = torch.arange(q.shape[0], device=device)
    begin = cu_seqlens.long()
    sequence = torch.bucketize(token, begin[1:], right=True).clamp(max=sequences - 1)
    slots = torch.where(token < begin[-1], sequence * (width * PAGE) + token - begin[sequence], -1)
    table = torch.arange(sequences * width, dtype=torch.int32, device=device).view(sequences, width)
    lens = (cu_seqlens[1:] - cu_seqlens[:-1]).int()
    out: Tensor = torch.ops.llm42.pod_attention(
        q, k, v, k_cache, v_cache, slots, cu_seqlens.int(), lens, table, scale, window, 0.0, None, False
    )
    return out


# Case 3.


def _pairs(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    calls = [n for n in graph.nodes if n.target is torch.ops.llm42.dense_attention.default]
    prefills = [n for n in calls if statically_known_true(_rows(n) > 1)]
    decodes = [n for n in calls if g.same(_rows(n), 1)]
    if not prefills or not decodes:
        return
    effects = g.Effects(graph)
    for a in prefills:
        where = g.order(graph)
        nearest = sorted(decodes, key=lambda d: abs(where[d] - where[a]))
        reasons = []
        for b in nearest:
            reason = _pair_refusal(a, b, where, effects) or usable(ctx, "pod_dense_attention")
            if reason is None:
                report.match(a)
                _merge(a, b, where, ctx.decode_workers)
                decodes.remove(b)
                break
            reasons.append(reason)
        else:
            if reasons:
                report.miss(a, reasons[0])


def _rows(node: fx.Node) -> Any:
    return g.fake(node.args[0]).shape[2]


def _pair_refusal(a: fx.Node, b: fx.Node, where: dict[fx.Node, int], effects: g.Effects) -> str | None:
    """Why a prefill and a decode call do not make one call."""
    if not _on_cpu(a):
        return "on a GPU, keys and values would have to be copied into pages"
    if g.fake(a).dtype != g.fake(b).dtype:
        return "the prefill and the decode call have different dtypes"
    first, second = sorted((a, b), key=where.__getitem__)
    if _depends(second, first, where):
        return "the prefill and the decode call depend on each other"
    if _anchor(first, second, where) is None:
        return "the result of one call is used before the other's operands exist"
    if not effects.unchanged([*first.all_input_nodes, *second.all_input_nodes], first, second):
        return "what one call reads is written before the other call"
    return None


def _depends(later: fx.Node, earlier: fx.Node, where: dict[fx.Node, int]) -> bool:
    seen: set[fx.Node] = set()
    queue = [later]
    while queue:
        node = queue.pop()
        if node is earlier:
            return True
        if node not in seen and where[node] > where[earlier]:
            seen.add(node)
            queue += node.all_input_nodes
    return False


def _anchor(first: fx.Node, second: fx.Node, where: dict[fx.Node, int]) -> fx.Node | None:
    """The call in whose place both can run, or None."""
    if all(where[n] < where[first] for n in second.all_input_nodes):
        return first
    return second if all(where[u] > where[second] for u in first.users) else None


def _merge(a: fx.Node, b: fx.Node, where: dict[fx.Node, int], workers: int) -> None:
    first, second = sorted((a, b), key=where.__getitem__)
    anchor = _anchor(first, second, where)
    if anchor is None:
        raise g.IllegalRewriteError(f"{a} and {b} cannot run in one place")
    args = (*a.args, *b.args, workers)
    both = g.insert(anchor, torch.ops.llm42.pod_dense_attention.default, args, like=a)
    y_a = g.insert(anchor, g.FUNCTIONS["getitem"], (both, 0), like=a)
    y_b = g.insert(anchor, g.FUNCTIONS["getitem"], (both, 1), like=b)
    g.replace(a, y_a)
    g.replace(b, y_b)
