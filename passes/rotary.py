"""Rotary position embedding (packed target).

Cases (x: [1, H, T, D]; cos, sin: [1, 1, T, D] or [1, T, D] broadcast over heads):

1. ``x * cos + rotate_half(x) * sin`` with ``rotate_half(x) = cat((-x[..., D/2:], x[..., :D/2]), -1)``,
   factors and terms in either order
2. two such calls on neighbouring head ranges of one tensor (q and k of a merged projection) with the
   same cos and sin become one call over both ranges

A rotation of only the first part of a head is case 1 on the slice. The interleaved form (GPT-J, Cohere)
is left alone: it is pointwise, Inductor compiles it.

Before and after (y = qkv: [1, T, (Hq + 2 Hkv) D])::

    q = y[..., :Hq*D].view(1, T, Hq, D).transpose(1, 2)
    q_embed = q * cos + cat((-q[..., D/2:], q[..., :D/2]), -1) * sin
    k = …; k_embed = …
                          ↓
    qk = y as [T, Hq + Hkv, D]
    r  = llm42.rotary(qk, cos [T, D], sin [T, D])
    q_embed, k_embed = r.split([Hq, Hkv], 1), each seen as [1, H, T, D]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport


@dataclass
class _Rotation:
    x: fx.Node
    cos: fx.Node
    sin: fx.Node


def _is_rotated(node: Any, x: fx.Node) -> bool:
    """node = cat((-x[..., D/2:], x[..., :D/2]), -1)."""
    if g.name(node) != "cat":
        return False
    bound, t = g.bind(node), g.fake(x)
    parts = bound["tensors"]
    if len(parts) != 2 or not g.last_dim(t, bound["dim"]) or g.name(parts[0]) != "neg":
        return False
    high, low = g.tensor(parts[0].args[0]), g.tensor(parts[1])
    half = t.shape[-1] // 2
    if high is None or low is None or g.storage(low) != g.storage(t) or g.storage(high) != g.storage(t):
        return False
    with g.fake_execution(x.graph):
        return g.same_view(low, t[..., :half]) and g.same_view(high, t[..., half:])


def _rotation(add: fx.Node) -> _Rotation | None:
    if len(add.args) != 2 or add.kwargs or not all(g.name(a) == "mul" for a in add.args):
        return None
    for straight, turned in (add.args, add.args[::-1]):
        for x, cos in (straight.args, straight.args[::-1]):  # type: ignore[union-attr]
            for rotated, sin in (turned.args, turned.args[::-1]):  # type: ignore[union-attr]
                if g.tensor(x) is not None and _is_rotated(rotated, x):  # type: ignore[arg-type]
                    return _Rotation(x, cos, sin)  # type: ignore[arg-type]
    return None


def _resembles(add: fx.Node) -> bool:
    """Two products are added, and a factor of one is put together from a negative part and another."""
    if len(add.args) != 2 or not all(g.name(a) == "mul" for a in add.args):
        return False
    factors = [f for product in add.args for f in product.args]  # type: ignore[union-attr]
    parts = [g.bind(f)["tensors"] for f in factors if isinstance(f, fx.Node) and g.name(f) == "cat"]
    return any(isinstance(p, (list, tuple)) and any(g.name(one) == "neg" for one in p) for p in parts)


def _refusal(r: _Rotation, add: fx.Node) -> str | None:
    x, cos, sin, out = g.fake(r.x), g.tensor(r.cos), g.tensor(r.sin), g.fake(add)
    if cos is None or sin is None or x.dim() != 4 or not g.same(x.shape[0], 1):
        return "not a packed batch [1, H, T, D]"
    if not x.dtype == cos.dtype == sin.dtype == out.dtype:
        return "cos and sin have another dtype than the heads"
    for table in (cos, sin):
        sizes = [s for s in table.shape if not g.same(s, 1)]
        rows_last = table.dim() >= 2 and g.same(table.shape[-2], x.shape[2])
        if len(sizes) != 2 or not rows_last or not g.same(table.shape[-1], x.shape[3]):
            return "cos and sin are not one row per token"
    return None


def _table(before: fx.Node, node: fx.Node) -> fx.Node:
    """[1, (1,) T, D] as [T, D]."""
    while g.name(node) == "unsqueeze" and g.fake(node).dim() > 2:
        node = node.args[0]  # type: ignore[assignment]
    while g.fake(node).dim() > 2:
        node = g.insert(before, g.FUNCTIONS["getitem"], (node, 0))
    return node


def rotary(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Case 1: every rotation, heads seen as [T, H, D]."""
    for add in list(graph.nodes):
        if g.name(add) != "add":
            continue
        if (r := _rotation(add)) is None:
            if _resembles(add):
                report.miss(add, "what is turned is not the two halves of what stands beside it")
            continue
        reason = _refusal(r, add)
        if reason is not None:
            report.miss(add, reason)
            continue
        heads = g.insert(add, g.FUNCTIONS["getitem"], (r.x, 0))  # [H, T, D]
        rows = g.insert(add, g.FUNCTIONS["transpose"], (heads, 0, 1))  # [T, H, D]
        args = (rows, _table(add, r.cos), _table(add, r.sin))
        turned = g.insert(add, torch.ops.llm42.rotary.default, args, like=add)
        back = g.insert(add, g.FUNCTIONS["transpose"], (turned, 0, 1))
        report.match(add)
        g.replace(add, g.insert(add, g.FUNCTIONS["unsqueeze"], (back, 0)))


def _follows(a: Tensor, b: Tensor) -> bool:
    """b's heads stand directly after a's in the same rows: both [T, H, D]."""
    if g.storage(a) != g.storage(b) or a.dim() != 3 or b.dim() != 3:
        return False
    same_rows = g.same(a.shape[0], b.shape[0]) and g.same(a.shape[2], b.shape[2])
    same_steps = all(g.same(x, y) for x, y in zip(a.stride(), b.stride(), strict=True))
    gap = a.storage_offset() + a.shape[1] * a.stride()[1]
    return same_rows and same_steps and g.same(b.storage_offset(), gap)


def merge_rotary(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Case 2. Expects the views that ``layout`` leaves: heads as ``as_strided`` of one root."""
    calls = [n for n in graph.nodes if n.target is torch.ops.llm42.rotary.default]
    position = g.order(graph)
    for a, b in itertools.pairwise(calls):
        (xa, *ta), (xb, *tb) = a.args, b.args
        if ta != tb or g.arg(xa) is None or g.arg(xa) is not g.arg(xb):
            continue
        reason = None
        if not _follows(g.fake(xa), g.fake(xb)):
            reason = "its heads do not stand behind the others of their tensor"
        elif g.bakes_layout(a) or g.bakes_layout(b):
            reason = "the rotated heads are read with fixed strides"
        elif xa.target is not torch.as_strided or any(position[t] > position[a] for t in tb):
            reason = "the heads are no plain view, or their table is computed later"
        if reason is not None:
            report.miss(b, reason)
            continue
        size, stride = list(xa.args[1]), xa.args[2]
        na, nb = size[1], xb.args[1][1]
        both = g.insert(a, torch.as_strided, (xa.args[0], (size[0], na + nb, size[2]), stride, xa.args[3]))
        turned = g.insert(a, torch.ops.llm42.rotary.default, (both, *ta), like=a)
        q = g.insert(a, g.FUNCTIONS["narrow"], (turned, 1, 0, na), like=a)
        k = g.insert(a, g.FUNCTIONS["narrow"], (turned, 1, na, nb), like=b)
        report.match(a)
        report.match(b)
        g.replace(a, q)
        g.replace(b, k)
