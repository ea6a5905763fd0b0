"""LayerNorm over the last dimension.

Cases:

1. ``F.layer_norm(x, (H,), w, b, eps)`` (``nn.LayerNorm``), w and b optional

A LayerNorm written out by hand is left to ``reductions``, which fixes its sums.

Before and after (x: [B, S, H])::

    y = F.layer_norm(x, (H,), w, b, 1e-5)    →    y = llm42.layer_norm(x, w, b, 1e-5)
"""

from __future__ import annotations

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport


def layer_norm(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every LayerNorm over the last dimension."""
    for node in list(graph.nodes):
        if g.name(node) != "layer_norm":
            continue
        bound, x = g.bind(node), g.tensor(node.args[0])
        if x is None or len(bound["normalized_shape"]) != 1:
            report.miss(node, "normalises over more than the last dimension")
            continue
        if x.dtype != g.fake(node).dtype:
            report.miss(node, "the result has another dtype than the input (autocast?)")
            continue
        args = (bound["input"], bound["weight"], bound["bias"], g.number(bound["eps"]))
        report.match(node)
        g.replace(node, g.insert(node, torch.ops.llm42.layer_norm.default, args))
