"""All-reduces get one fixed order of summation.

Cases:

1. ``wait_tensor(_c10d_functional.all_reduce(x, "sum", group))``      → ``llm42.all_reduce(x, group)``
2. the same written back, as ``dist.all_reduce(x)`` is traced: ``x.copy_(wait_tensor(…))``. Later readers of
   x, and of whole views of it, read the sum instead, and the copy goes. x must be a result of the graph,
   not one of its inputs.
3. a DTensor's partial sums made whole: ``DTensor.from_local(x, mesh, [Partial()])``, ``redistribute`` to
   ``[Replicate()]``, ``to_local``

A library adds the ranks' values in an order that depends on the message's size, so a row's bits would
depend on the rows that travel with it. Averages, products and maxima are left as they are, and so are
all-reduces that are waited for more than once or differentiated through.

Before and after (x: [B, S, H], this rank's partial sum)::

    a = _c10d_functional.all_reduce(x, 'sum', '0')
    b = _c10d_functional.wait_tensor(a)             →    y = llm42.all_reduce(x, '0')
    x.copy_(b)                                           … every later reader of x reads y
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport, usable


def functional(node: Any) -> str:
    """``"all_reduce"`` for a call of ``torch.ops._c10d_functional.all_reduce``; "" for anything else."""
    target = node.target if isinstance(node, fx.Node) and node.op == "call_function" else None
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return ""
    space, _, called = target._qualified_op_name.partition("::")
    return called if space == "_c10d_functional" else ""


def _group_name(group: Any) -> str:
    return group if isinstance(group, str) else str(group.group_name)


def _refusal(node: fx.Node, ctx: Context) -> str | None:
    if node.args[1] != "sum":
        return f"a reduction by {node.args[1]!r}"
    if (reason := usable(ctx, "all_reduce")) is not None:
        return reason
    if len(node.users) != 1 or functional(g.only_user(node)) != "wait_tensor":
        return "it is not waited for exactly once"
    return None


def _whole(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Both are row-major and cover the same elements of one storage."""
    aligned = g.same(a.storage_offset(), b.storage_offset()) and g.same(a.numel(), b.numel())
    return aligned and a.dtype == b.dtype and g.is_contiguous(a) and g.is_contiguous(b)


def _readers(copy: fx.Node, position: dict[fx.Node, int]) -> list[tuple[fx.Node, list[fx.Node]]] | str:
    """Nodes that name the overwritten memory, each with its readers after the copy; or why it must stay."""
    written = copy.args[0]
    key, at = g.storage_of(written), position[copy]  # type: ignore[arg-type]
    found = []
    for alias in position:
        if g.storage_of(alias) != key:
            continue
        if alias.op != "call_function" and alias.op != "call_method":
            return "it is written into an input of the graph"
        later = [u for u in alias.users if position[u] > at]
        if not later or position[alias] > at:
            continue
        if alias is not copy and not _whole(g.fake(alias), g.fake(written)):
            return "a view of a part of it is read after it was overwritten"
        found.append((alias, later))
    return found


def _without_copy(copy: fx.Node, total: fx.Node) -> str | None:
    """Case 2; returns why the copy stays."""
    if not g.same_shape(g.fake(copy.args[0]), g.fake(total)):
        return "the copy broadcasts"
    readers = _readers(copy, g.order(copy.graph))
    if isinstance(readers, str):
        return readers
    stale: list[fx.Node] = []
    for alias, later in readers:
        value = total
        if not g.same_shape(g.fake(alias), g.fake(total)):
            value = g.insert(copy, "view_as", (total, alias), like=alias)
        for user in later:
            user.replace_input_with(alias, value)
        stale += later
    copy.graph.erase_node(copy)
    g.refresh(stale)
    return None


def _fixed(node: fx.Node) -> fx.Node:
    """Case 1: the rank-ordered sum in place of ``node`` and its wait."""
    (wait,) = node.users
    total = g.insert(wait, torch.ops.llm42.all_reduce.default, (node.args[0], _group_name(node.args[2])))
    g.replace(wait, total)
    node.graph.erase_node(node)
    return total


def _summands(whole: fx.Node) -> tuple[fx.Node, str] | None:
    """Case 3: (this rank's part, the group's name) where ``whole`` is the ``to_local`` of a DTensor's sum."""
    from torch.distributed.tensor import DTensor, Partial  # slow to import, and here only if it is in use

    made = g.arg(whole)
    parts = g.arg(made) if getattr(made, "target", None) == "redistribute" else None
    local: Any = g.arg(parts) if getattr(parts, "target", None) is DTensor.from_local else None
    before, after = g.value(parts), g.value(made)
    if g.tensor(local) is None or isinstance(g.fake(local), DTensor) or before.device_mesh.ndim != 1:
        return None
    placement = before.placements[0]
    if type(placement) is not Partial or placement.reduce_op != "sum":
        return None
    return (local, before.device_mesh.get_group().group_name) if after.placements[0].is_replicate() else None


def _make_whole(whole: fx.Node, ctx: Context, report: PassReport) -> None:
    found = _summands(whole)
    if found is None:
        return
    if (reason := usable(ctx, "all_reduce")) is not None:
        report.miss(whole, reason)
        return
    report.match(whole)
    made = whole.args[0]
    g.replace(whole, g.insert(whole, torch.ops.llm42.all_reduce.default, found))
    g.erase_dead([made.args[0], made])  # type: ignore[union-attr,list-item]


def collectives(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every all-reduce that sums, and what is written back from it."""
    for node in list(graph.nodes):
        if node.target == "to_local":
            _make_whole(node, ctx, report)
        if functional(node) == "all_reduce":
            reason = _refusal(node, ctx)
            if reason is not None:
                report.miss(node, reason)
                continue
            report.match(node)
            total = _fixed(node)
            copy = next((u for u in total.users if g.name(u) == "copy_" and u.args[1] is total), None)
            kept = _without_copy(copy, total) if copy is not None else None
            if copy is not None and kept is not None:
                report.miss(copy, kept)
