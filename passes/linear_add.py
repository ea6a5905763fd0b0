"""A linear whose result is only added to a tensor of its own shape takes the addition along (packed).

Cases:

1. ``residual + llm42.linear(x, packed, bias, N)``, operands in either order, the product used once
2. the same of a product with quantised weights, ``llm42.linear_q``

Runs after ``add_rms_norm``, which takes the additions that a norm follows.

Before and after (x: [1, T, K]; residual, h: [1, T, N])::

    y = llm42.linear(x, packed, None, N)
    h = torch.add(residual, y)             →    h = llm42.linear_add(x, packed, None, residual, N)
"""

from __future__ import annotations

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport
from llm42c.passes.linear_q import is_product


def linear_add(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Fuse every such addition."""
    for add in list(graph.nodes):
        if g.name(add) != "add" or len(add.args) != 2 or add.kwargs:
            continue
        for y, residual in (add.args, add.args[::-1]):
            quantised = is_product(y)
            if not quantised and getattr(y, "target", None) is not torch.ops.llm42.linear.default:
                continue
            t, h = g.tensor(residual), g.fake(add)
            if t is None or len(y.users) != 1 or t.dtype != h.dtype or not g.same_shape(t, h):
                report.miss(add, "the product is used elsewhere, or the addition broadcasts or promotes")
                continue
            report.match(add)
            if quantised:
                args, target = (*y.args[:5], residual, False), torch.ops.llm42.linear_q.default
            else:
                x, packed, bias, n = y.args
                args, target = (x, packed, bias, residual, n), torch.ops.llm42.linear_add.default
            g.replace(add, g.insert(add, target, args, like=y))
            break
