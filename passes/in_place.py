"""Writes to tensors that the graph itself made become values: a graph that writes cannot be cut into pieces.

Cases:

1. ``zeros_like(x).scatter_(…)`` → ``zeros_like(x).scatter(…)``, ``x += y`` → ``torch.add(x, y)``, … where no
   view of the tensor that is older than the write is read after it
2. ``y = new_empty(…)``, ``y[..., :n].copy_(a)``, ``y[..., n:].copy_(b)`` → ``torch.cat((a, b), -1)``

Inputs and parameters that are written to are left as they are.

Before and after (x: [T, E], a: [T, n], b: [T, m])::

    mask = torch.zeros_like(x)               mask = torch.zeros_like(x)
    mask.scatter_(1, index, 1)         →     mask_1 = mask.scatter(1, index, 1)
    y = x * mask                             y = x * mask_1
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.kinds import plain_name

_IN_PLACE = {
    operator.iadd: torch.add,
    operator.isub: torch.sub,
    operator.imul: torch.mul,
    operator.itruediv: torch.div,
}


def written_in_place(graph: fx.Graph) -> None:
    """Case 1: a tensor that the graph made, and that has no other view, need not be written to.

    Who reads it afterwards reads the result instead.
    """
    views: dict[int | None, list[fx.Node]] = {}  # nodes by storage, in graph order
    for node in graph.nodes:
        views.setdefault(g.storage_of(node), []).append(node)
    for node in list(graph.nodes):
        base, written = g.arg(node), g.mutated_arguments(node)
        if not isinstance(base, fx.Node) or written != [base] or g.tensor(node) is None:
            continue
        pure = _pure(node)
        views_before = [n for n in views[g.storage_of(base)] if n is not base and n < node]
        made_here = base.op in ("call_function", "call_method") and views[g.storage_of(base)][0] is base
        if pure is None or not made_here or _read(views_before, node):
            continue
        same = g.same_shape(g.fake(base), g.fake(node)) and g.fake(base).dtype == g.fake(node).dtype
        if not same:
            continue
        node.op, node.target = pure
        for user in [user for user in base.users if node < user]:
            user.replace_input_with(base, node)
        g.compute_value(node)
        views.setdefault(g.storage_of(node), []).append(node)
        g.refresh(g.users(node))


def filled_by_parts(graph: fx.Graph) -> None:
    """Case 2: an empty tensor whose last dimension is written slice by slice is a ``cat`` of the parts."""
    for node in list(graph.nodes):
        if (
            plain_name(node) not in ("new_empty", "empty", "empty_like", "new_zeros")
            or g.tensor(node) is None
        ):
            continue
        parts = {user: _part(user, node) for user in node.users}
        filled = sorted((p for p in parts.values() if p is not None), key=lambda p: p[0])
        ends = [0, *(end for _, end, _ in filled)]
        tiled = [begin for begin, _, _ in filled] == ends[:-1] and g.same(g.fake(node).shape[-1], ends[-1])
        if len(filled) < 2 or not tiled:
            continue
        last = max(copy for _, _, copy in filled)
        if any(part is None and user < last for user, part in parts.items()):
            continue
        sources = [copy.args[1] for _, _, copy in filled]
        shapes = [(g.tensor(x), g.fake(copy)) for x, (_, _, copy) in zip(sources, filled, strict=True)]
        if any(x is None or x.dtype != t.dtype or not g.same_shape(x, t) for x, t in shapes):
            continue
        whole = g.insert(last.next, g.FUNCTIONS["cat"], (sources, -1), like=node)
        for _, _, copy in filled:
            (view,) = (n for n in copy.all_input_nodes if n in parts)
            graph.erase_node(copy)
            graph.erase_node(view)
        g.replace(node, whole)


def _part(view: fx.Node, base: fx.Node) -> tuple[int, int, fx.Node] | None:
    """(begin, end, copy) of ``base[..., begin:end].copy_(x)`` or None."""
    copy, index = g.only_user(view), g.arg(view, 1)
    if g.name(view) != "getitem" or copy is None or copy.target != "copy_" or copy.args[0] is not view:
        return None
    whole = isinstance(index, tuple) and len(index) > 0 and isinstance(index[-1], slice) and not copy.users
    others = index[:-1] if whole else (None,)
    if not whole or len(copy.args) != 2 or any(i is not Ellipsis and i != slice(None) for i in others):
        return None
    if Ellipsis not in others and len(index) != g.fake(base).dim():
        return None
    begin, end, step = index[-1].start or 0, index[-1].stop, index[-1].step or 1
    end = g.fake(base).shape[-1] if end is None else end
    return (begin, int(end), copy) if isinstance(begin, int) and isinstance(end, int) and step == 1 else None


def _read(nodes: list[fx.Node], after: fx.Node) -> bool:
    return any(after < user for n in nodes for user in n.users)


def _pure(node: fx.Node) -> tuple[str, Any] | None:
    """Operation and target of the call that computes the same and writes nothing."""
    if node.op == "call_function" and node.target in _IN_PLACE:
        return "call_function", _IN_PLACE[node.target]
    name = str(node.target)
    if node.op == "call_method" and name.endswith("_") and hasattr(torch.Tensor, name[:-1]):
        return "call_method", name[:-1]
    return None
