"""A batched product with an addend becomes a product and a sum, so that later passes see the product.

Cases (c: broadcasts to [B, M, N]; a: [B, M, K]; b: [B, K, N]):

1. ``torch.baddbmm(c, a, b, beta=β, alpha=α)``: ``β·c + α·(a @ b)``; with β = 0, c is not read at all
2. ``torch.addmm(c, a, b, beta=β, alpha=α)`` with other factors than 1, in the same way

Half precision is widened to fp32 and rounded once, as the fused call rounds.

Before and after (fp32)::

    s = torch.baddbmm(c, q, kt, beta=1, alpha=0.25)     →     s = torch.bmm(q, kt) * 0.25 + c
"""

from __future__ import annotations

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _refusal(node: fx.Node, operands: list[fx.Node], factors: list[float | None]) -> str | None:
    if any(factor is None for factor in factors):
        return "beta or alpha is not known at compile time"
    if any(g.fake(x).dtype != g.fake(node).dtype for x in operands) or g.fake(node).dtype not in _FLOATS:
        return f"operands of several dtypes, or of {g.fake(node).dtype}"
    return None


def addends(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Take every such call apart."""
    for node in list(graph.nodes):
        kind = g.name(node)
        if kind not in ("baddbmm", "addmm"):
            continue
        bound = g.bind(node)
        beta, alpha = g.number(bound["beta"]), g.number(bound["alpha"])
        if kind == "addmm" and beta == alpha == 1.0:
            continue  # a linear with a bias
        c, a, b = list(bound.values())[:3]
        if (reason := _refusal(node, [c, a, b], [beta, alpha])) is not None:
            report.miss(node, reason)
            continue
        report.match(node)
        g.replace(node, _apart(node, kind, c, a, b, beta, alpha))


def _apart(
    node: fx.Node, kind: str, c: fx.Node, a: fx.Node, b: fx.Node, beta: float | None, alpha: float | None
) -> fx.Node:
    dtype = g.fake(node).dtype

    def wide(x: fx.Node) -> fx.Node:
        return x if dtype == torch.float32 else g.insert(node, "to", (x, torch.float32))

    def scaled(x: fx.Node, factor: float | None) -> fx.Node:
        return x if factor == 1.0 else g.insert(node, g.FUNCTIONS["mul"], (x, factor))

    product = g.FUNCTIONS["bmm" if kind == "baddbmm" else "mm"]
    y = scaled(g.insert(node, product, (wide(a), wide(b))), alpha)
    if beta != 0.0:
        y = g.insert(node, g.FUNCTIONS["add"], (y, scaled(wide(c), beta)))
    return y if dtype == torch.float32 else g.insert(node, "to", (y, dtype))
