"""Rows added to the places that an index names become ``llm42::index_add``.

A mixture of experts that is written out adds each expert's rows to those of their tokens. A token's sum is
then in the order of the rows, whatever threads or atomics do.

Cases (x: [T, H], index: [R], source: [R, H]):

1. ``torch.index_add(x, dim, index, source)``
2. ``x.index_add_(dim, index, source)``: the sum is written back to ``x``, at the same place in the graph

Not rewritten: ``alpha`` other than 1, integers (their sums are exact), fp64, operands of several dtypes.

Before and after::

    y = x.index_add_(0, index, source)   →   s = llm42.index_add(x, 0, index, source)       # [T, H]
                                             y = x.copy_(s)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport, usable

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ARGUMENTS = ("input", "dim", "index", "source", "alpha")


def _bound(node: fx.Node) -> dict[str, Any]:
    bound = dict.fromkeys(_ARGUMENTS) | dict(zip(_ARGUMENTS, node.args, strict=False))
    return bound | {"input" if key == "self" else key: arg for key, arg in node.kwargs.items()}


def _refusal(bound: dict[str, Any], ctx: Context) -> str | None:
    x, index, source = (g.tensor(bound[key]) for key in ("input", "index", "source"))
    if x is None or index is None or source is None or not isinstance(bound["dim"], int):
        return "arguments that are not known"
    if bound["alpha"] not in (None, 1):
        return "index_add with a factor"
    if x.dim() == 0 or index.dim() != 1 or x.dtype != source.dtype or x.dtype not in _FLOATS:
        return f"{x.dim()}-dimensional {x.dtype} and {source.dtype}"
    return usable(ctx, "index_add")


def index_add(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every sum of floats at indices."""
    for node in list(graph.nodes):
        if g.called(node) not in ("index_add", "index_add_"):
            continue
        if not g.fake(node).is_floating_point():
            continue
        bound = _bound(node)
        reason = _refusal(bound, ctx)
        if reason is not None:
            report.miss(node, reason)
            continue
        args = tuple(bound[key] for key in _ARGUMENTS[:4])
        new = g.insert(node, torch.ops.llm42.index_add.default, args)
        report.match(node)
        if g.called(node) == "index_add_":
            new = g.insert(node, "copy_", (bound["input"], new))
        g.replace(node, new)
