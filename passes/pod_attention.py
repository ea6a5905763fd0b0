"""Hybrid attention becomes ``llm42::pod_attention``.

Whether a batch is hybrid is known at run time only; the operator dispatches inside.

Cases:

1. ``llm42::paged_attention`` (packed graphs)
2. ``torch_attn::_varlen_attn`` over its own tokens: causal, the same ``cu_seqlens`` for queries and keys,
   no block table; the keys go through pages made for the call
3. a prefill SDPA call [1, H, S, D] (causal) and a decode SDPA call [B, H, 1, D] (no mask) that do not
   depend on each other, of one shape of heads, known sizes and one scale

Case 1 is rewritten for GPUs; a CPU's ``paged_attention`` schedules both kinds of work itself. Cases 2 and 3
copy keys and values into pages, which the pass does only where it is asked for (``ctx`` of a packed graph
never holds them). Not rewritten: paged ``_varlen_attn``, whose cache is [pages, page, H, D]; windows to the
right; users of the log-sum-exp; SDPA with a mask, since raggedness sits in its values.

Before and after, case 1::

    y = llm42.paged_attention(q, k, v, kc, vc, slots, cu, lens, table, s, w, c, sinks)      # [T, Hq, D]
                                     ↓
    y = llm42.pod_attention(q, k, v, kc, vc, slots, cu, lens, table, s, w, c, sinks, False)

Case 3 (q_p: [1, Hq, S, D], k_p, v_p: [1, Hkv, L, D], q_d: [B, Hq, 1, D], k_d, v_d: [B, Hkv, M, D])::

    y_p = sdpa(q_p, k_p, v_p, is_causal=True)           kc = cat(pages of k_p, pages of k_d)
    y_d = sdpa(q_d, k_d, v_d)                      →    q  = cat(q_p, q_d)                 # [S + B, Hq, D]
                                                        y  = llm42.pod_attention(q, ..., kc, vc, ...)
                                                        y_p, y_d = y[:S], y[S:]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from llm42c.passes import graph as g
from llm42c.passes.attention_sdpa import unrepeated
from llm42c.passes.base import Context, PassReport

PAGE = 16


def pod_attention(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Case 1 on GPUs."""
    rewrite(graph, ctx, report, devices=("cuda",), copies=False)


def rewrite(
    graph: fx.Graph, ctx: Context, report: PassReport, devices: tuple[str, ...], copies: bool
) -> None:
    """All cases on ``devices``; cases 2 and 3 if ``copies`` of keys and values are allowed."""
    for node in list(graph.nodes):
        if node.target is torch.ops.llm42.paged_attention.default:
            _paged(node, report, devices)
        elif "_varlen_attn" in str(node.target) and node.op == "call_function":
            _varlen(node, ctx, report, devices, copies)
    _pairs(graph, ctx, report, devices, copies)


def _paged(node: fx.Node, report: PassReport, devices: tuple[str, ...]) -> None:
    if g.fake(node).device.type not in devices:
        report.miss(node, "a CPU's paged_attention schedules prefills and decodes itself")
        return
    report.match(node)
    new = g.insert(
        node, torch.ops.llm42.pod_attention.default, (*node.args, False), dict(node.kwargs), like=node
    )
    g.replace(node, new)


def _allowed(node: fx.Node, ctx: Context, devices: tuple[str, ...], copies: bool) -> str | None:
    if g.fake(node.all_input_nodes[0]).device.type not in devices:
        return "not on a GPU"
    if not copies:
        return "keys and values would have to be copied into pages"
    return "pod_attention has no autograd formula" if ctx.grad else None


# Case 2.


def _varlen(node: fx.Node, ctx: Context, report: PassReport, devices: tuple[str, ...], copies: bool) -> None:
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "scale",
             "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits")  # fmt: skip
    bound: dict[str, Any] = {
        **dict.fromkeys(names),
        **dict(zip(names, node.args, strict=False)),
        **node.kwargs,
    }
    reason = _varlen_refusal(node, bound) or _allowed(node, ctx, devices, copies)
    if reason is not None:
        report.miss(node, reason)
        return
    report.match(node)
    q, k, v, cu = bound["query"], bound["key"], bound["value"], bound["cu_seq_q"]
    left = (bound["window_size"] or (-1, 0))[0]
    scale = g.number(bound["scale"])
    scale = 1 / math.sqrt(int(g.fake(q).shape[-1])) if scale is None else scale
    args = (q, k, v, cu, int(bound["max_k"]), scale, left + 1 if left >= 0 else 0)
    new = g.insert(node, varlen_through_pages, args, like=node)
    for user in list(node.users):
        g.replace(user, new) if len(node.users) == 1 else user.replace_all_uses_with(new)
    if not node.users:
        node.graph.erase_node(node)


def _varlen_refusal(node: fx.Node, bound: dict[str, Any]) -> str | None:
    if any(g.name(u) != "getitem" or u.args[1] != 0 for u in node.users) or len(node.users) != 1:
        return "the log-sum-exp is used"
    if bound["block_table"] is not None:
        return "the cache is laid out [pages, page, H, D]"
    if bound["cu_seq_k"] is not bound["cu_seq_q"] or bound["seqused_k"] is not None:
        return "queries and keys are of different tokens"
    window = bound["window_size"]
    if not bound["is_causal"] and (window is None or window[1] != 0):
        return "not causal"
    return None if isinstance(bound["max_k"], int) else "max_k is not known at compile time"


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


@dataclass
class _Call:
    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    causal: bool

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(s) for s in g.fake(getattr(self, name)).shape)


def _call(node: fx.Node) -> _Call | None:
    """An SDPA call of known sizes without mask or dropout."""
    bound = g.bind(node)
    if bound["attn_mask"] is not None or g.number(bound["dropout_p"]) != 0.0:
        return None
    q, k, v = bound["query"], unrepeated(bound["key"]), unrepeated(bound["value"])
    tensors = [g.fake(x) for x in (q, k, v)]
    if any(t.dim() != 4 or any(not isinstance(s, int) for s in t.shape) for t in tensors):
        return None
    scale = g.number(bound["scale"])
    scale = 1 / math.sqrt(tensors[0].shape[-1]) if scale is None else scale
    return _Call(node, q, k, v, scale, bound["is_causal"] is True)


def _depends(node: fx.Node, on: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        at = queue.pop()
        if at is on:
            return True
        if at not in seen:
            seen.add(at)
            queue += at.all_input_nodes
    return False


def _mismatch(a: _Call, b: _Call) -> str | None:
    """Why a prefill and a decode call do not make one batch."""
    same_heads = a.shape("q")[1] == b.shape("q")[1] and a.shape("k")[1] == b.shape("k")[1]
    if not same_heads or a.shape("q")[3] != b.shape("q")[3] or a.scale != b.scale:
        return "the prefill and the decode call have different heads or scales"
    if a.shape("q")[2] != a.shape("k")[2]:
        return "the prefill call does not begin at its first key"
    if _depends(a.node, b.node) or _depends(b.node, a.node):
        return "the prefill and the decode call depend on each other"
    return None


def _pairs(graph: fx.Graph, ctx: Context, report: PassReport, devices: tuple[str, ...], copies: bool) -> None:
    calls = [c for n in graph.nodes if g.name(n) == "sdpa" and (c := _call(n)) is not None]
    prefills = [c for c in calls if c.causal and c.shape("q")[0] == 1 and c.shape("q")[2] > 1]
    decodes = [c for c in calls if c.shape("q")[2] == 1 and not c.causal]
    for a in prefills:
        b = next((d for d in decodes if _mismatch(a, d) is None), None)
        if b is None:
            if decodes:
                report.miss(a.node, _mismatch(a, decodes[0]) or "")
            continue
        if (reason := _allowed(a.node, ctx, devices, copies)) is not None:
            report.miss(a.node, reason)
            continue
        decodes.remove(b)
        _merge(graph, a, b, report)


def _merge(graph: fx.Graph, a: _Call, b: _Call, report: PassReport) -> None:
    """One call behind the operands of both, in front of the users of both."""
    where = g.order(graph)
    last = max((a.q, a.k, a.v, b.q, b.k, b.v), key=where.__getitem__)
    first, second = sorted((a.node, b.node), key=where.__getitem__)
    if where[last] > where[first]:
        early = [u for u in first.users if where[u] < where[last]]
        if early:
            report.miss(a.node, "the result of one call is used before the other's operands exist")
            return
    anchor = second if where[last] > where[first] else first
    report.match(a.node)
    args = (a.q, a.k, a.v, b.q, b.k, b.v, a.scale)
    both = g.insert(anchor, pair_through_pages, args, like=a.node)
    y_a = g.insert(anchor, g.FUNCTIONS["getitem"], (both, 0), like=a.node)
    y_b = g.insert(anchor, g.FUNCTIONS["getitem"], (both, 1), like=b.node)
    g.replace(a.node, y_a)
    g.replace(b.node, y_b)


def _pages(x: Tensor) -> Tensor:
    """[B, Hkv, L, D] → [B · ceil(L / PAGE), Hkv, PAGE, D]."""
    batch, heads, length, dim = x.shape
    width = -(-length // PAGE)
    padded = torch.nn.functional.pad(x, (0, 0, 0, width * PAGE - length))
    return (
        padded.view(batch, heads, width, PAGE, dim).transpose(1, 2).reshape(batch * width, heads, PAGE, dim)
    )


def pair_through_pages(
    q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of a prefill [1, Hq, S, D] and of a decode batch [B, Hq, 1, D] in one call."""
    rows, batch, device = q_p.shape[2], q_d.shape[0], q_p.device
    lengths = [k_p.shape[2], k_d.shape[2]]
    widths = [-(-n // PAGE) for n in lengths]
    q = torch.cat((q_p[0].transpose(0, 1), q_d[:, :, 0]))  # [S + B, Hq, D]
    v_cache = torch.cat((_pages(v_p), _pages(v_d)))
    k_cache = torch.cat((_pages(k_p), _pages(k_d))).transpose(2, 3).contiguous()
    i = torch.arange(batch + 1, dtype=torch.int32, device=device)
    cu = torch.where(i == 0, 0, i + rows - 1).int()
    cu = torch.cat((cu, cu[-1:] + 1))  # 0, S, S + 1, ..., S + B
    lens = torch.where(i == 0, lengths[0], lengths[1]).int()
    column = torch.arange(max(widths), dtype=torch.int32, device=device)
    start = torch.where(i == 0, 0, widths[0] + (i - 1) * widths[1])[:, None]
    width = torch.where(i == 0, widths[0], widths[1])[:, None]
    table = torch.where(column < width, start + column, 0).int()
    slots = torch.full((rows + batch,), -1, dtype=torch.int64, device=device)
    unused = q.new_zeros(rows + batch, k_p.shape[1], q.shape[2])  # keys are in the pages already
    out = torch.ops.llm42.pod_attention(
        q, unused, unused, k_cache, v_cache, slots, cu, lens, table, scale, 0, 0.0, None, False
    )
    return out[:rows].transpose(0, 1)[None].contiguous(), out[rows:, :, None].contiguous()
