"""Triangular systems become ``llm42::solve_triangular`` (plain), as chunked linear attention solves them.

Cases (a: [..., N, N], b: [..., N, K], fp32):

1. ``torch.linalg.solve_triangular(a, b, upper=..., unitriangular=...)``
2. with ``left=False``, ``x a = b``: the transposed system

Before and after::

    x = torch.linalg.solve_triangular(a, b, upper=False)   →   x = llm42.solve_triangular(a, b, False, False)
"""

from __future__ import annotations

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport, usable


def _refusal(node: fx.Node, ctx: Context) -> str | None:
    a, b = (g.tensor(operand) for operand in node.args[:2])
    if a is None or b is None or len(node.args) != 2 or "out" in node.kwargs:
        return "arguments that are not known"
    if not a.dtype == b.dtype == torch.float32:
        return f"dtypes {a.dtype} and {b.dtype}"
    return usable(ctx, "solve_triangular")


def _transposed(before: fx.Node, x: fx.Node) -> fx.Node:
    return g.insert(before, g.FUNCTIONS["transpose"], (x, -1, -2))


def solve_triangular(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every triangular system."""
    for node in list(graph.nodes):
        if node.op != "call_function" or "solve_triangular" not in g.called(node):
            continue
        if g.called(node).startswith("llm42"):
            continue
        reason = _refusal(node, ctx)
        if reason is not None:
            report.miss(node, reason)
            continue
        a, b = node.args[:2]
        upper, left = bool(node.kwargs["upper"]), node.kwargs.get("left", True)
        unit = bool(node.kwargs.get("unitriangular", False))
        if not left:
            a, b, upper = _transposed(node, a), _transposed(node, b), not upper
        new = g.insert(node, torch.ops.llm42.solve_triangular.default, (a, b, upper, unit))
        report.match(node)
        g.replace(node, new if left else _transposed(node, new))
