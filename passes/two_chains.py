"""Products in the order in which AMX adds: ``two-chains32`` instead of ``fma-chain`` (packed, on request).

A choice of other bits, the same on every CPU, for machines that have AMX; not in the list, so it runs for
those who name it: ``passes=["two_chains"]``. Products of bf16 with packed weights become those of
``codegen/ops/linear_blocks.py``. Others keep their order: they are no work of AMX's, or not packed.

Before and after (x: [1, T, K], all bf16)::

    y = llm42.linear(x, packed, b, N)       →    y = llm42.linear_blocks(x, packed, b, N)
"""

from __future__ import annotations

import torch
from torch import fx

from llm42c.codegen import targets
from llm42c.codegen.ops.registry import operators
from llm42c.passes import graph as g
from llm42c.passes.base import PACKED, Context, Pass, PassReport

_NAMES = {name: f"{name}_blocks" for name in ("linear", "linear_silu_mul", "linear_add")}


def two_chains(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every product of bf16 that has the order.

    Raises IllegalRewriteError on a device whose target does not have it.
    """
    for node in list(graph.nodes):
        ours = g.ours(node)
        if ours is None or ours.name not in _NAMES:
            continue
        x = g.fake(node.args[0])
        if x.dtype != torch.bfloat16:
            report.miss(node, f"of {x.dtype}")
            continue
        other = operators()[_NAMES[ours.name]]
        if targets.of(x.device).name not in other.orders:
            raise g.IllegalRewriteError(f"two-chains32 is an order of CPUs, and the model lies on {x.device}")
        report.match(node)
        g.replace(node, g.insert(node, other.overload, node.args, like=node))


TWO_CHAINS = Pass(
    "two_chains",
    two_chains,
    frozenset({PACKED}),
    before="wanted_rows",
    makes=frozenset(_NAMES.values()),
)
