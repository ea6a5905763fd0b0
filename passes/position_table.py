"""Functions of a token's position become tables that are computed once (packed target).

Rotary cosines and sines are the same small computation in every step. With a known largest position they
are rows of a table; looking a row up copies bits, so it cannot depend on the batch, and a model whose
other calls are all fused needs no generated kernel at all.

Cases:

1. a value computed from the positions [1, T] and constants (parameters, their views and casts) alone, by
   pointwise calls, views and concatenations that keep exactly one dimension of T (``cos``, ``sin`` [1, T, D])
                                                     → ``index_select(table, dim, positions)``

A value that is cheaper to compute than to look up (a cast, a view) is left alone, and so is one whose
tables would take more than 64 MiB.

Before and after (p: [1, T], table: [1, limit, D])::

    e   = p[..., None].to(float32) * inv_freq        # [1, T, D/2]
    e   = cat((e, e), -1)                            # [1, T, D]        →    cos = index_select(table, 1, p)
    cos = cos(e).to(bfloat16)                        # [1, T, D]
"""

from __future__ import annotations

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes import recipes
from llm42c.passes.base import Context, PassReport, PositionInput
from llm42c.passes.kinds import Kind, kind

MAX_BYTES = 64 << 20


def _row_axis(node: fx.Node, rows: object) -> int | None:
    """The one dimension of size T, or None when there is none or more."""
    t = g.tensor(node)
    axes = [] if t is None else [i for i, size in enumerate(t.shape) if g.same(size, rows)]
    return axes[0] if len(axes) == 1 else None


def _is_rowwise(node: fx.Node, rows: object) -> bool:
    """Each row of the result is computed from the same row of the operands."""
    k = kind(node)
    if k not in (Kind.VIEW, Kind.EXACT, Kind.TRANSCENDENTAL) and g.name(node) != "cat":
        return False
    axis = _row_axis(node, rows)
    if axis is None:
        return False
    if g.name(node) == "cat":
        bound = g.bind(node)
        return bound["dim"] % g.fake(node).dim() != axis
    return True


def _functions_of(positions: fx.Node, rows: object) -> tuple[list[fx.Node], set[fx.Node]]:
    """Nodes computed row by row from the positions and constants alone, and the constants that are computed
    from parameters; the first list holds both, in graph order.
    """
    found: dict[fx.Node, None] = {}
    constants: set[fx.Node] = set()
    for node in positions.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        sources = node.all_input_nodes
        if not all(s is positions or s in found or s.op == "get_attr" for s in sources):
            continue
        if any(s is positions or (s in found and s not in constants) for s in sources):
            if _is_rowwise(node, rows):
                found[node] = None
        elif sources and kind(node) in (Kind.VIEW, Kind.EXACT):
            found[node] = None
            constants.add(node)
    return list(found), constants


def _needed(results: list[fx.Node], among: list[fx.Node]) -> list[fx.Node]:
    keep = set(results)
    for node in reversed(among):
        if node in keep:
            keep.update(n for n in node.all_input_nodes if n in among)
    return [n for n in among if n in keep]


def _subgraph(result: fx.Node, among: list[fx.Node], positions: fx.Node) -> recipes.PositionTable:
    """The computation of ``result`` as a graph with one input, and its row axis."""
    graph = fx.Graph()
    copied = {positions: graph.placeholder("positions")}
    for node in _needed([result], among):
        for source in node.all_input_nodes:
            if source not in copied:
                copied[source] = graph.get_attr(str(source.target))
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(copied[result])
    return recipes.PositionTable(graph, result.name)


def position_table(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every worthwhile function of the positions by a look-up."""
    spec: PositionInput | None = ctx.positions
    positions = next((n for n in graph.nodes if spec and n.name == spec.placeholder), None)
    if spec is None or positions is None:
        return
    rows = g.fake(positions).shape[-1]
    among, constants = _functions_of(positions, rows)
    inside = set(among)
    results = [n for n in among if n not in constants and any(u not in inside for u in n.users)]
    worth = [n for n in results if any(kind(m) is Kind.TRANSCENDENTAL for m in _needed([n], among))]
    size = sum(g.fake(n).numel() // rows * spec.limit * g.fake(n).dtype.itemsize for n in worth)
    if size > MAX_BYTES:
        for node in worth:
            report.miss(node, f"the tables would take {size >> 20} MiB")
        return
    first = next(n for n in graph.nodes if n.op in ("call_function", "call_method"))
    index = g.insert(first, g.FUNCTIONS["reshape"], (positions, (-1,)), like=first) if worth else None
    for node in worth:
        axis = [g.same(size, rows) for size in g.fake(node).shape].index(True)
        recipe = _subgraph(node, among, positions)
        table = recipes.table_constant(graph, recipe, g.fake(node), axis, spec.limit)
        report.match(node)
        g.replace(node, g.insert(node, torch.index_select, (table, axis, index), like=node))
