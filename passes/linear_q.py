"""Products with quantised weights: those of one input become one call (packed target).

Cases (gate, up, wq, … are packed weights, each in its own format):

1. ``silu(linear_q(x, [gate])) * linear_q(x, [up])``, factors in either order, neither with a bias
2. several products of one input, all with a bias or all without

The call takes the weights side by side as they are: nothing is copied, and x is quantised once. The bits
stay: an output element is one chain over its own row and column.

Before and after (x: [1, T, K])::

    a = llm42.linear_q(x, [gate], "q4_0", [I], None, None, False)
    b = llm42.linear_q(x, [up], "q4_1", [I], None, None, False)
    z = silu(a) * b                                  # [1, T, I]
        →  z = llm42.linear_q(x, [gate, up], "q4_0,q4_1", [I, I], None, None, True)

    q = llm42.linear_q(x, [wq], "q4_k", [N], None, None, False)
    v = llm42.linear_q(x, [wv], "q6_k", [M], None, None, False)
        →  y    = llm42.linear_q(x, [wq, wv], "q4_k,q6_k", [N, M], None, None, False)
           q, v = torch.split(y, [N, M], dim=-1)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes import recipes
from llm42c.passes.base import Context, PassReport
from llm42c.passes.cleanup import erase_dead_code
from llm42c.passes.linear_silu_mul import factors_of_gate


def is_product(node: Any) -> bool:
    """A product with quantised weights that takes no residual and is not gated."""
    if getattr(node, "target", None) is not torch.ops.llm42.linear_q.default:
        return False
    _, _, _, _, _, residual, gated = node.args
    return residual is None and not gated


def linear_q(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Merge gates with what they gate, then whatever else reads one input."""
    for node in list(graph.nodes):
        if (found := factors_of_gate(node)) is not None and all(map(is_product, found[1:])):
            _gate(node, found[1], found[2], report)
    erase_dead_code(graph)  # the gates' products read the same input
    groups: dict[tuple[fx.Node, bool], list[fx.Node]] = {}
    for node in graph.nodes:
        if is_product(node):
            bias = node.args[4]
            if bias is not None and bias.op != "get_attr":
                report.miss(node, "its bias is computed")
                continue
            groups.setdefault((node.args[0], bias is not None), []).append(node)
    for members in groups.values():
        if len(members) > 1:
            _merge(graph, members, report)


def _side_by_side(members: list[fx.Node]) -> tuple[list[fx.Node], str, list[int]]:
    """Weights, formats and sizes of all members."""
    weights = [w for node in members for w in node.args[1]]  # type: ignore[union-attr]
    sizes = [n for node in members for n in node.args[3]]  # type: ignore[union-attr]
    return weights, ",".join(str(node.args[2]) for node in members), sizes  # type: ignore[return-value]


def _gate(node: fx.Node, gate: fx.Node, up: fx.Node, report: PassReport) -> None:
    if gate.args[0] is not up.args[0] or gate.args[4] or up.args[4] or len(gate.users) + len(up.users) != 2:
        report.miss(node, "gate and up have a bias, several inputs, or are used elsewhere")
        return
    weights, formats, sizes = _side_by_side([gate, up])
    if len(weights) != 2 or sizes[0] != sizes[1]:
        report.miss(node, "gate and up are not two weights of one size")
        return
    args = (gate.args[0], weights, formats, sizes, None, None, True)
    report.match(node)
    g.replace(node, g.insert(node, torch.ops.llm42.linear_q.default, args))


def _merge(graph: fx.Graph, members: list[fx.Node], report: PassReport) -> None:
    first = members[0]
    weights, formats, sizes = _side_by_side(members)
    bias = None
    if first.args[4] is not None:
        parts = tuple(recipes.Part(str(node.args[4].target)) for node in members)  # type: ignore[union-attr]
        bias = recipes.constant(graph, recipes.StackedBias(parts))
    args = (first.args[0], weights, formats, sizes, bias, None, False)
    merged = g.insert(first, torch.ops.llm42.linear_q.default, args)
    widths = [g.fake(node).shape[-1] for node in members]
    pieces = g.insert(first, g.FUNCTIONS["split"], (merged, widths), {"dim": -1})
    parts_of = [g.insert(first, operator.getitem, (pieces, i), like=node) for i, node in enumerate(members)]
    for node, piece in zip(members, parts_of, strict=True):
        report.match(node)
        g.replace(node, piece)
