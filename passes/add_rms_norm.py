"""A residual addition in front of an RMSNorm becomes part of it.

Cases:

1. ``h = residual + x;  y = rms_norm(h, ...)``, h used elsewhere (the residual stream) or not
                                   → ``y, h = add_rms_norm(x, residual, ...)``

Both operands have the shape and dtype of h. Which operand is called the residual does not matter:
the sum is one rounding and commutes.

Before and after (bf16, all [B, S, H])::

    h = torch.add(residual, x)
    y = llm42.rms_norm(h, w, eps, 0.0, True)    →    y, h = llm42.add_rms_norm(x, residual, w, eps, 0.0, True)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport


def _refusal(norm: fx.Node, add: fx.Node, position: dict[fx.Node, int]) -> str | None:
    if g.name(add) != "add":
        return "its input is no addition"
    if len(add.args) != 2 or add.kwargs:
        return "the addition scales an operand"
    a, b = (g.tensor(arg) for arg in add.args)
    h = g.fake(add)
    if a is None or b is None or not all(t.dtype == h.dtype and g.same_shape(t, h) for t in (a, b)):
        return "the addition broadcasts or promotes"
    weight = norm.args[1]
    computed = isinstance(weight, fx.Node) and weight.op not in ("placeholder", "get_attr")
    if computed and position.get(weight, len(position)) > position.get(add, -1):  # type: ignore[arg-type]
        return "the weight is computed after the addition"
    return None


def add_rms_norm(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Fuse every residual addition into the RMSNorm that reads it."""
    position = g.order(graph)
    for norm in list(graph.nodes):
        if norm.target is not torch.ops.llm42.rms_norm.default:
            continue
        add = norm.args[0]
        reason = _refusal(norm, add, position)
        if reason is not None:
            report.miss(norm, reason)
            continue
        residual, x = add.args
        target = torch.ops.llm42.add_rms_norm.default
        both = g.insert(add, target, (x, residual, *norm.args[1:]), like=norm)
        normed = g.insert(add, operator.getitem, (both, 0), like=norm)
        summed = g.insert(add, operator.getitem, (both, 1), like=add)
        report.match(norm)
        g.replace(norm, normed)
        g.replace(add, summed)
