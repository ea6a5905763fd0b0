"""What only the rows whose logits are wanted are read of is computed for those rows alone (packed).

``y = x[:, wanted]``, or ``index_select`` along a dimension of rows, moves up through the llm42 operators that
give each row from that row alone, as far as nobody else reads what they give. A row's bits do not depend on
how many rows there are, so none changes. After it, a prompt's last layer computes its products for one row a
request.

Cases:

1. operators whose ``tokens`` is ``ROWS`` or ``POINTWISE`` and that send nothing to other ranks, and parts of
   their results
2. operands of theirs that have no rows (weights) stay as they are

It is left alone where no product would become smaller.

Before and after (x, h: [1, T, N]; wanted: [R])::

    h = llm42.linear_add(x, packed, None, h0, N)     x_0 = x[:, wanted];  h_0 = h0[:, wanted]
    y = llm42.rms_norm(h, weight, eps)            →  h = llm42.linear_add(x_0, packed, None, h_0, N)
    y_0 = y[:, wanted]                               y_0 = llm42.rms_norm(h, weight, eps)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from llm42c.codegen.operator import Operator, Tokens
from llm42c.codegen.ops.registry import our_operator
from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport

_BY_ROW = (Tokens.ROWS, Tokens.POINTWISE)


def wanted_rows(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Move every such choice up."""
    for choice in list(graph.nodes):
        found = _chosen(choice)
        if found is None:
            continue
        x, dim, wanted = found
        inside = _only_read_by(choice, x, dim)
        if not any(_is_product(node) for node in inside):
            report.miss(choice, "no product gives rows that nobody else reads")
            continue
        report.match(choice)
        g.replace(choice, _move_up(choice, inside, x, dim, wanted))


def _chosen(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """x, dim and wanted of ``x[:, wanted, :]``, where `wanted` is an input that holds numbers of rows."""
    x: Any
    dim: Any
    wanted: Any
    if node.target is operator.getitem and isinstance(node.args[1], tuple):
        x, parts = node.args[0], node.args[1]
        at = [i for i, p in enumerate(parts) if p != slice(None)]
        dim, wanted = (at[0], parts[at[0]]) if len(at) == 1 else (-1, None)
    elif g.name(node) in ("index_select", "aten::index_select"):
        x, dim, wanted = node.args
    else:
        return None
    rows, t = g.tensor(wanted), g.tensor(x)
    if rows is None or t is None or wanted.op != "placeholder":
        return None
    one = rows.dim() == 1 and rows.dtype == torch.int64
    return (x, dim, wanted) if one and 0 <= dim < t.dim() - 1 else None


def _operator(node: fx.Node) -> Operator | None:
    return our_operator(g.name(node))


def _is_product(node: fx.Node) -> bool:
    ours = _operator(node)
    return ours is not None and ours.product is not None


def _by_row(node: Any, rows: Any, dim: int) -> bool:
    """Whether it is one of the operators that give each row from that row alone."""
    ours = _operator(node)
    if ours is None or ours.tokens not in _BY_ROW or ours.traffic is not None:
        return False
    values = g.value(node)
    values = values if isinstance(values, (tuple, list)) else (values,)
    return all(dim < v.dim() - 1 and v.shape[dim] == rows for v in values)


def _is_part(node: fx.Node) -> bool:
    """One of the results of a call."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _only_read_by(choice: fx.Node, x: fx.Node, dim: int) -> list[fx.Node]:
    """The operators, and parts of their results, that nobody but ``choice`` reads in the end; in order."""
    rows = g.fake(x).shape[dim]
    inside: dict[fx.Node, None] = {}
    node = choice
    while node.prev.op != "root":
        node = node.prev
        if not node.users or any(user is not choice and user not in inside for user in node.users):
            continue
        if _by_row(node.args[0] if _is_part(node) else node, rows, dim):
            inside[node] = None
    return [node for node in reversed(inside) if not _is_part(node) or node.args[0] in inside]


def _move_up(choice: fx.Node, inside: list[fx.Node], x: fx.Node, dim: int, wanted: fx.Node) -> fx.Node:
    """The operators `inside` again in front of ``choice``, for the wanted rows; what is x there."""
    rows, ranks = g.fake(x).shape[dim], g.fake(x).dim()
    moved: dict[fx.Node, fx.Node] = {}

    def few(operand: fx.Node) -> fx.Node:
        if operand in moved:
            return moved[operand]
        t = g.tensor(operand)
        if t is None or t.dim() != ranks or t.shape[dim] != rows:
            return operand
        moved[operand] = g.insert(choice, torch.index_select, (operand, dim, wanted))
        return moved[operand]

    for node in inside:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), few)
        moved[node] = g.insert(choice, node.target, args, kwargs, like=node)
    return moved[x]
