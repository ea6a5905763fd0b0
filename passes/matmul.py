"""Products of two computed tensors (plain or packed), after attention and weights have been recognised.

Cases (a: [*, M, K], b: [*, K, N], leading dimensions broadcast):

1. ``a @ b``, ``torch.matmul``, ``torch.bmm``

Row m of batch j is a linear with the "weight" ``b[j]``, which is what ``grouped_linear`` computes: one
chain over k for each element.

Before and after (a: [B, M, K], b: [B, K, N])::

    y = torch.bmm(a, b)          j = arange(B).repeat_interleave(M)                          # [B·M]
                            →    y = llm42.grouped_linear(a.reshape(B·M, K), b, None, j, True)
                                 y = y.reshape(B, M, N)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport, usable

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _refusal(node: fx.Node, ctx: Context) -> str | None:
    a, b = (g.tensor(arg) for arg in node.args[:2])
    if a is None or b is None or a.dim() < 2 or b.dim() < 2:
        return "not a product of matrices"
    if not a.dtype == b.dtype == g.fake(node).dtype or a.dtype not in _FLOATS:
        return f"operands of dtypes {a.dtype}, {b.dtype} → {g.fake(node).dtype}"
    return usable(ctx, "grouped_linear")


def _batched(node: fx.Node, operand: fx.Node, batch: list[Any]) -> fx.Node:
    """The operand with its leading dimensions broadcast to ``batch`` and folded to one."""
    rows, cols = (g.size(node, operand, d) for d in (-2, -1))
    t = g.fake(operand)
    if t.dim() != 3 or len(batch) != 1 or not g.same(t.shape[0], g.value(batch[0])):
        operand = g.insert(node, "expand", (operand, *batch, rows, cols))
        operand = g.insert(node, g.FUNCTIONS["reshape"], (operand, (-1, rows, cols)))
    return operand


def _batch_sizes(node: fx.Node, a: fx.Node, b: fx.Node) -> list[Any]:
    """Broadcast leading sizes, each taken from the operand that is not 1 there."""
    sizes: list[Any] = []
    leading = max(g.fake(a).dim(), g.fake(b).dim()) - 2
    for i in range(leading):
        dim = i - leading - 2
        owner = a if -dim <= g.fake(a).dim() and not g.same(g.fake(a).shape[dim], 1) else b
        owner = owner if -dim <= g.fake(owner).dim() else a
        sizes.append(g.size(node, owner, dim))
    return sizes


def matmul(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every product of two computed tensors by ``grouped_linear``."""
    for node in list(graph.nodes):
        if g.name(node) not in ("matmul", "bmm"):
            continue
        reason = _refusal(node, ctx)
        if reason is not None:
            report.miss(node, reason)
            continue
        a, b = node.args[:2]
        batch = _batch_sizes(node, a, b)
        rows, cols = g.size(node, a, -2), g.size(node, b, -1)
        left, right = _batched(node, a, batch), _batched(node, b, batch)
        count = g.size(node, left, 0)
        group = g.insert(node, torch.arange, (count,), {"device": g.fake(node).device})
        group = g.insert(node, g.FUNCTIONS["unsqueeze"], (group, 1))
        group = g.insert(node, "expand", (group, count, rows))
        group = g.insert(node, g.FUNCTIONS["reshape"], (group, (-1,)))
        flat = g.insert(node, g.FUNCTIONS["flatten"], (left, 0, 1))
        y = g.insert(node, torch.ops.llm42.grouped_linear.default, (flat, right, None, group, True))
        y = g.insert(node, g.FUNCTIONS["reshape"], (y, (*batch, rows, cols)))
        report.match(node)
        g.replace(node, y)
