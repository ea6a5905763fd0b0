"""``F.scaled_dot_product_attention`` becomes ``llm42::dense_attention``.

Cases:

1. causal or full attention without a mask
2. a boolean or additive mask [B|1, H|1, Sq, Sk]
3. ``enable_gqa=True``: the operator groups query heads itself
4. keys and values repeated in front of the call (Hugging Face's ``repeat_kv``) are taken unrepeated,
   when the expansion is the only thing between:
   ``k[:, :, None].expand(B, Hkv, G, S, D).reshape(B, Hkv * G, S, D)``  or ``repeat_interleave(k, G, 1)``
5. heads of any size, values of another size than keys (``head_dims.py``)

Not rewritten: dropout in training; fp64.

Before and after (q: [B, Hq, S, D], k, v: [B, Hkv, S, D])::

    k4 = k[:, :, None].expand(B, Hkv, G, S, D).reshape(B, Hq, S, D)
    v4 = v[:, :, None].expand(B, Hkv, G, S, D).reshape(B, Hq, S, D)
    y  = F.scaled_dot_product_attention(q, k4, v4, mask, scale=s)
                                     ↓
    y  = llm42.dense_attention(q, k, v, mask, s, False, 0, 0.0)          # [B, Hq, S, D]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport, usable
from llm42c.passes.head_dims import dense_attention

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def unrepeated(node: fx.Node) -> fx.Node:
    """The tensor [B, Hkv, S, D] that ``node`` [B, Hkv * G, S, D] repeats head by head, or ``node``."""
    t = g.tensor(node)
    if t is None or t.dim() != 4:
        return node
    if g.name(node) == "repeat_interleave":
        repeats, dim = (*node.args[1:], node.kwargs.get("dim"))[:2]
        return node.args[0] if isinstance(repeats, int) and dim in (1, -3) else node  # type: ignore[return-value]
    if g.name(node) != "reshape" or g.name(expand := node.args[0]) != "expand":
        return node
    unsqueezed = expand.args[0]  # type: ignore[union-attr]
    base = unsqueezed.args[0] if g.name(unsqueezed) in ("getitem", "unsqueeze") else None  # type: ignore[union-attr]
    small, mid, wide = g.tensor(base), g.tensor(unsqueezed), g.tensor(expand)
    if small is None or mid is None or wide is None or small.dim() != 4 or wide.dim() != 5:
        return node
    b, h, s, d = small.shape
    shapes = zip(mid.shape, (b, h, 1, s, d), strict=True)
    grown = zip(wide.shape, (b, h, wide.shape[2], s, d), strict=True)
    inserted = g.storage(small) == g.storage(mid) and all(g.same(x, y) for x, y in (*shapes, *grown))
    folded = g.same(t.shape[1], h * wide.shape[2]) and g.same(t.shape[2], s) and g.same(t.shape[3], d)
    return base if inserted and folded else node  # type: ignore[return-value]


def _refusal(node: fx.Node, bound: dict[str, Any], ctx: Context) -> str | None:
    q, mask = g.tensor(bound["query"]), g.tensor(bound["attn_mask"])
    if q is None or q.dim() != 4:
        return "the query is not [B, H, S, D]"
    if q.dtype not in _FLOATS or g.tensor(node).dtype != q.dtype:  # type: ignore[union-attr]
        return f"dtype {q.dtype}"
    if any(g.tensor(bound[k]).dtype != q.dtype for k in ("key", "value")):  # type: ignore[union-attr]
        return "query, key and value have different dtypes"
    if g.number(bound["dropout_p"]) != 0.0:
        return "attention dropout"
    if not isinstance(bound["is_causal"], bool):
        return "is_causal is not known at compile time"
    if mask is not None and mask.dim() not in (2, 3, 4):
        return f"a mask with {mask.dim()} dimensions"
    return usable(ctx, "dense_attention")


def _mask_4d(node: fx.Node, mask: fx.Node | None) -> fx.Node | None:
    """The mask as [B|1, H|1, Sq, Sk]."""
    if mask is None:
        return None
    for _ in range(4 - g.tensor(mask).dim()):  # type: ignore[union-attr]
        mask = g.insert(node, g.FUNCTIONS["unsqueeze"], (mask, 0))
    return mask


def attention_sdpa(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every call that the operator can compute."""
    effects = g.Effects(graph)
    for node in list(graph.nodes):
        if g.name(node) != "sdpa":
            continue
        bound = g.bind(node)
        reason = _refusal(node, bound, ctx)
        if reason is not None:
            report.miss(node, reason)
            continue
        q, k, v = bound["query"], unrepeated(bound["key"]), unrepeated(bound["value"])
        same_heads = g.same(g.tensor(k).shape[1], g.tensor(v).shape[1])  # type: ignore[union-attr]
        if not same_heads or not effects.unchanged([k, v], min(k, v), node):
            k, v = bound["key"], bound["value"]
        scale = g.number(bound["scale"])
        if scale is None:
            scale = float(int(g.tensor(q).shape[-1])) ** -0.5  # type: ignore[union-attr]
        options = (_mask_4d(node, bound["attn_mask"]), scale, bound["is_causal"], 0, 0.0)
        report.match(node)
        g.replace(node, dense_attention(node, q, k, v, *options))
