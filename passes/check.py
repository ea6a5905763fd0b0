"""The last step: every call of the final graph must have a known order of arithmetic.

Cases:

1. an llm42 operator: its order is part of its definition
2. views, copies, exactly rounded pointwise calls, sums of integers, maxima: the order cannot be seen
3. exp, tanh, ...: fixed by compiling without vector code (see ``llm42c.inductor``)
4. anything else, a sum of floats that no pass knew or an unknown call, is *unplaced* and named

The graph is not changed. Whoever runs the pipeline decides whether an unplaced call is an error.
"""

from __future__ import annotations

from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, Event, PassReport
from llm42c.passes.kinds import Kind, kind, plain_name


def unplaced(graph: fx.Graph) -> list[Event]:
    """The calls of case 4."""
    found = []
    for node in graph.nodes:
        if node.op == "call_module" or node.op in ("call_function", "call_method"):
            k = Kind.UNKNOWN if node.op == "call_module" else kind(node)
            if k in (Kind.REDUCTION, Kind.UNKNOWN):
                found.append(Event(node.name, g.where(node), f"{plain_name(node)}: {k.value}"))
    return found


def check(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Report unplaced calls as misses."""
    report.misses += unplaced(graph)
