"""Chains of views collapse; views that name the same elements become one node (packed target).

A view is described by what it is, not by how it was made: storage, sizes, strides and offset of its
fake tensor. That makes the rules independent of spelling.

Cases (r: the operator result that owns the storage):

1. a view with r's own sizes and strides is r: ``r.unsqueeze(0)[0]``,
   ``r.transpose(0, 1).transpose(0, 1)``, ``reshape`` to the same shape
2. a view equal to an earlier view of r is that view
3. a row-major view of all of a row-major r, reached over several steps, is ``r.view(sizes)``
4. any other view reached over several steps is one ``as_strided`` of r

Cases 3 and 4 need sizes that are numbers or inputs of the graph (T). ``contiguous``/``reshape`` that
copies is no view and ends a chain. Only results of llm42 operators are taken as r: their strides are
fixed by their fakes. The graph must not write to r.

Before and after (y: [1, T, 960], o: [T, 9, 64])::

    a = y.view(1, T, 15, 64)
    b = a.transpose(1, 2)                    q = as_strided(y, (T, 15, 64), (960, 64, 1), 0)
    c = b[0]                           →
    q = c.transpose(0, 1)
    p = o.unsqueeze(0).reshape(1, T, 576)    p = o.view(1, -1, 576)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport
from llm42c.passes.sizes import PRIMES


def _sources(graph: fx.Graph) -> dict[str, fx.Node]:
    """Graph inputs that are sizes, by the text of their symbol (or of the prime that stands for it)."""
    inputs = (n for n in graph.nodes if n.op == "placeholder")
    return {str(v): n for n in inputs if isinstance(v := g.value(n), (int, torch.SymInt))}


def _as_arguments(sizes: Any, known: dict[str, fx.Node]) -> tuple[Any, ...] | None:
    """Sizes as numbers and graph inputs, or None when one is neither."""
    out: list[Any] = []
    for s in sizes:
        if (node := known.get(str(s))) is not None:
            out.append(node)
        elif isinstance(s, int) and s < min(PRIMES):
            out.append(s)
        else:
            return None
    return tuple(out)


def _express(node: fx.Node, root: fx.Node, known: dict[str, fx.Node]) -> fx.Node | None:
    """Cases 3 and 4."""
    v, r = g.fake(node), g.fake(root)
    sizes = _as_arguments(v.shape, known)
    if sizes is None:
        return None
    if g.is_contiguous(v) and g.is_contiguous(r) and g.same(v.numel(), r.numel()):
        free = [i for i, s in enumerate(sizes) if isinstance(s, fx.Node)]
        if len(free) == 1:
            sizes = (*sizes[: free[0]], -1, *sizes[free[0] + 1 :])
        return g.insert(node, "view", (root, sizes), like=node)
    # The stride of a dimension of size 1 is never used; its recorded value may be an expression of T.
    strides = [1 if g.same(s, 1) else t for s, t in zip(v.shape, v.stride(), strict=True)]
    steps, offset = _as_arguments(strides, known), v.storage_offset()
    if steps is None or not isinstance(offset, int):
        return None
    return g.insert(node, torch.as_strided, (root, sizes, steps, offset), like=node)


def _written(graph: fx.Graph) -> set[int]:
    return {
        g.storage(t)
        for node in graph.nodes
        for arg in g.mutated_arguments(node)
        if (t := g.tensor(arg)) is not None
    }


def layout(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Collapse every chain of views."""
    known, written = _sources(graph), _written(graph)
    owners: dict[int, fx.Node] = {}
    views: dict[int, list[fx.Node]] = {}
    for node in list(graph.nodes):
        v = g.tensor(node)
        if v is None:
            continue
        key = g.storage(v)
        root = owners.setdefault(key, node)
        if root is node or not _is_operator_result(root) or key in written:
            continue
        twin = next((u for u in [root, *views.get(key, [])] if g.same_view(g.fake(u), v)), None)
        if twin is not None:
            report.match(node)
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
            continue
        if _depth(node, root) > 1 and any(g.storage_of(u) != key for u in node.users):
            direct = _express(node, root, known)
            if direct is None:
                report.miss(node, "a size or stride of the view is neither a number nor an input")
            else:
                report.match(node)
                node.replace_all_uses_with(direct)
                graph.erase_node(node)
                node = direct
        views.setdefault(key, []).append(node)


def _is_operator_result(node: fx.Node) -> bool:
    """The node is a tensor that an llm42 operator returned, perhaps out of a tuple."""
    if g.name(node) == "getitem":
        node = node.args[0]  # type: ignore[assignment]
    return g.ours(node) is not None


def _depth(node: fx.Node, root: fx.Node) -> int:
    """Number of steps from ``root`` to ``node``."""
    steps = 0
    while node is not root and node.all_input_nodes:
        node = node.all_input_nodes[0]
        steps += 1
    return steps
