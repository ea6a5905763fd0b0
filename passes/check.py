"""The last step: every call of the final graph must have a known order of arithmetic.

Cases:

1. an llm42 operator: its order is part of its definition
2. views, copies, exactly rounded pointwise calls, sums of integers, maxima: the order cannot be seen
3. exp, tanh, ...: fixed by compiling without vector code (see ``llm42c.compile.inductor``)
4. a sort that keeps equals in their order, and the values of a top-k alone
5. a packed graph that writes to tensors runs call by call, where 3. does not hold: its exp, tanh, ... are
   unplaced
6. anything else is *unplaced* and named: a sum of floats that no pass knew (also one that writes, such as
   ``scatter_add_`` and an ``index_put_`` that accumulates), a choice among equals, a call that no list of
   ``kinds.py`` has

A sum over the batch that a model itself asks for (batch norm in training, a mean over all rows) can have an
order and still makes a row depend on the others; that is the model, and is not named here.

The graph is not changed. Whoever runs the pipeline decides whether an unplaced call is an error.
"""

from __future__ import annotations

from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import PACKED, Context, Event, PassReport
from llm42c.passes.kinds import UNPLACED, Kind, kind


def unplaced(graph: fx.Graph) -> list[Event]:
    """The calls of case 6."""
    found = []
    for node in graph.nodes:
        if node.op == "call_module" or node.op in ("call_function", "call_method"):
            k = Kind.UNKNOWN if node.op == "call_module" else kind(node)
            if k in UNPLACED:
                found.append(Event(node.name, g.where(node), f"{g.called(node)}: {k.value}"))
    return found


def check(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Report unplaced calls as misses."""
    report.misses += unplaced(graph)
    if ctx.target == PACKED:
        report.misses += _call_by_call(graph)


def _call_by_call(graph: fx.Graph) -> list[Event]:
    """The calls of case 5."""
    writes = [n for n in graph.nodes if g.mutated_arguments(n) and kind(n) is not Kind.OPERATOR]
    rounded = [n for n in graph.nodes if n.op.startswith("call") and kind(n) is Kind.TRANSCENDENTAL]
    reason = "a graph that writes to tensors ({}) runs call by call"
    return [
        Event(n.name, g.where(n), f"{g.called(n)}: {reason.format(writes[0].name)}")
        for n in rounded
        if writes
    ]
