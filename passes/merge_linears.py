"""Linears that read the same input become one, over stacked weights (packed target).

Cases:

1. q, k and v projection without bias
2. the same with biases on all of them (Qwen 2): the biases are stacked too

One wide product reads x once and starts one parallel region instead of three. The bits stay: an output
element is one chain over k, whatever columns stand beside it.

Before and after (x: [1, T, K]; wq: [Nq, K], wk, wv: [Nk, K])::

    q = F.linear(x, wq)          y       = llm42.linear(x, packed(wq‖wk‖wv), None, Nq + 2 Nk)
    k = F.linear(x, wk)     →    q, k, v = torch.split(y, [Nq, Nk, Nk], dim=-1)
    v = F.linear(x, wv)
"""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes import recipes
from llm42c.passes.base import Context, PassReport
from llm42c.passes.linear import Product, is_uniform, product, refusal

_Groups = dict[tuple[fx.Node, bool], list[tuple[fx.Node, Product]]]


def _why_not(p: Product, node: fx.Node) -> str | None:
    """Why a product cannot stand in a stack."""
    if (why := refusal(p, node)) is not None:
        return why
    if not is_uniform(p, node):
        return "operands and result have several dtypes (autocast?)"
    if any(operand is not None and operand.op != "get_attr" for operand in (p.weight, p.bias)):
        return "its weight or bias is computed"
    return None


def _candidates(graph: fx.Graph, report: PassReport) -> _Groups:
    """Linears over parameters, grouped by (input, has a bias). One whose input others read too, and that has
    no companion, is a miss."""
    products = [(node, p) for node in graph.nodes if (p := product(node)) is not None]
    readers = Counter(p.x for _, p in products)
    groups: _Groups = {}
    for node, p in products:
        why = _why_not(p, node)
        if why is None:
            groups.setdefault((p.x, p.bias is not None), []).append((node, p))
        elif readers[p.x] > 1:
            report.miss(node, why)
    for (x, biased), members in groups.items():
        if len(members) == 1 and readers[x] > 1:
            report.miss(members[0][0], f"no other product of its input has {'a' if biased else 'no'} bias")
    return groups


def _merge(graph: fx.Graph, members: list[tuple[fx.Node, Product]]) -> None:
    first = members[0][0]
    parts = [recipes.Part(str(p.weight.target), p.transposed) for _, p in members]
    packed = recipes.constant(graph, recipes.PackedWeight(tuple(parts)))
    bias = None
    if members[0][1].bias is not None:
        biases = tuple(recipes.Part(str(p.bias.target)) for _, p in members if p.bias is not None)
        bias = recipes.constant(graph, recipes.StackedBias(biases))
    sizes = [g.fake(node).shape[-1] for node, _ in members]
    args = (members[0][1].x, packed, bias, sum(sizes))
    merged = g.insert(first, torch.ops.llm42.linear.default, args)
    pieces = g.insert(first, g.FUNCTIONS["split"], (merged, sizes), {"dim": -1})
    # All of them before any replacement: `first` marks their place, and it is a member itself.
    parts_of = [
        g.insert(first, operator.getitem, (pieces, i), like=node) for i, (node, _) in enumerate(members)
    ]
    for (node, _), piece in zip(members, parts_of, strict=True):
        g.replace(node, piece)


def merge_linears(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Merge every group of two or more."""
    for members in _candidates(graph, report).values():
        if len(members) < 2:
            continue
        for node, _ in members:
            report.match(node)
        _merge(graph, members)
