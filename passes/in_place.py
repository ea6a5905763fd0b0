"""Writes to tensors that the graph itself made become values: a graph that writes cannot be cut into pieces.

Cases:

1. ``zeros_like(x).scatter_(…)`` → ``zeros_like(x).scatter(…)``, ``x += y`` → ``torch.add(x, y)``, … where no
   view of the tensor that is older than the write is read after it
2. ``x[1:] += y`` → ``torch.slice_scatter(x, torch.add(x[1:], y), 0, 1)``, and ``x[1:] = y`` likewise
3. ``y = new_empty(…)``, ``y[..., :n].copy_(a)``, ``y[..., n:].copy_(b)`` → ``torch.cat((a, b), -1)``

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

Pure = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
_IN_PLACE: dict[Any, Any] = {
    operator.iadd: torch.add,
    operator.isub: torch.sub,
    operator.imul: torch.mul,
    operator.itruediv: torch.div,
}


def written_in_place(graph: fx.Graph) -> None:
    """Case 1: a tensor that the graph made, of which no other view is read, need not be written to.

    Who reads it afterwards reads the result instead.
    """
    for node in list(graph.nodes):
        _written_back(node)
    views: dict[int | None, list[fx.Node]] = {}  # nodes by storage, in graph order
    for node in graph.nodes:
        views.setdefault(g.storage_of(node), []).append(node)
    for node in list(graph.nodes):
        base, written = g.arg(node), g.mutated_arguments(node)
        if not isinstance(base, fx.Node) or written != [base] or g.tensor(base) is None:
            continue
        views_before = [n for n in views[g.storage_of(base)] if n is not base and n < node]
        made_here = views[g.storage_of(base)][0].op in ("call_function", "call_method")
        pure = _pure(node)
        if pure is None or not made_here or _read(views_before, node):
            continue
        node.op, node.target, node.args, node.kwargs = pure
        for user in [user for user in base.users if node < user]:
            user.replace_input_with(base, node)
        g.compute_value(node)
        views.setdefault(g.storage_of(node), []).append(node)
        g.refresh(g.users(node))


def _written_back(node: fx.Node) -> None:
    """Case 2: ``x[i] += y`` adds to a view, and writes the view to where it is: the first is no write."""
    if node.target is not operator.setitem:
        return
    base, index, value = node.args
    if not isinstance(value, fx.Node) or value.target not in _IN_PLACE:
        return
    view = g.arg(value)
    if not isinstance(view, fx.Node) or g.name(view) != "getitem" or view.args != (base, index):
        return
    if g.only_user(view) is value and g.only_user(value) is node and value.next is node:
        value.target = _IN_PLACE[value.target]
        g.compute_value(value)


def _scatter(node: fx.Node) -> Pure | None:
    """Case 2: ``x[..., begin:end] = y`` with y of the shape of what it replaces."""
    args: Any = node.args
    base, index, value = args
    indices = index if isinstance(index, tuple) else (index,)
    t, y = g.tensor(base), g.tensor(value)
    if t is None or y is None or not all(isinstance(i, slice) for i in indices) or len(indices) > t.dim():
        return None
    chosen = [d for d, i in enumerate(indices) if i != slice(None)]
    if len(chosen) != 1 or y.dtype != t.dtype or y.dim() != t.dim():
        return None
    (dim,) = chosen
    begin, end, step = indices[dim].start, indices[dim].stop, indices[dim].step
    numbers = all(i is None or (isinstance(i, int) and i >= 0) for i in (begin, end, step))
    pairs = enumerate(zip(t.shape, y.shape, strict=True))
    if not numbers or not all(g.same(a, b) for d, (a, b) in pairs if d != dim):
        return None
    if not isinstance(t.shape[dim], int) or len(range(*indices[dim].indices(t.shape[dim]))) != y.shape[dim]:
        return None
    return "call_function", torch.slice_scatter, (base, value, dim, begin, end, step or 1), {}


def filled_by_parts(graph: fx.Graph) -> None:
    """Case 3: an empty tensor whose last dimension is written slice by slice is a ``cat`` of the parts."""
    for node in list(graph.nodes):
        if g.called(node) not in ("new_empty", "empty", "empty_like", "new_zeros") or g.tensor(node) is None:
            continue
        parts = {user: _part(user, node) for user in node.users}
        filled = sorted((p for p in parts.values() if p is not None), key=lambda p: p[0])
        if len(filled) < 2:
            continue
        ends = [0, *(end for _, end, _ in filled)]
        tiled = [begin for begin, _, _ in filled] == ends[:-1] and g.same(g.fake(node).shape[-1], ends[-1])
        if not tiled:
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


def _pure(node: fx.Node) -> Pure | None:
    """Operation, target and arguments of the call that computes what the tensor holds after the write."""
    if node.target is operator.setitem:
        return _scatter(node)
    base, result = g.tensor(node.args[0]), g.tensor(node)
    if base is None or result is None or not g.same_shape(base, result) or base.dtype != result.dtype:
        return None
    if node.op == "call_function" and node.target in _IN_PLACE:
        return "call_function", _IN_PLACE[node.target], node.args, node.kwargs
    name = str(node.target)
    if node.op == "call_method" and name.endswith("_") and hasattr(torch.Tensor, name[:-1]):
        return "call_method", name[:-1], node.args, node.kwargs
    return None
