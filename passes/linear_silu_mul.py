"""The gated MLP's first half: gate and up projection, SiLU and product in one operator.

Cases (packed target; gate and up are [I, K] parameters without bias):

1. ``silu(F.linear(x, gate)) * F.linear(x, up)``, factors in either order
2. one merged projection [2I, K]:  ``a, b = F.linear(x, w).chunk(2, -1);  b * silu(a)``  (Phi-3);
   ``split`` and slices likewise
3. what is left, plain or packed:  ``silu(y[..., :I]) * y[..., I:]``  → ``silu_mul(y)``

Before and after (x: [1, T, K])::

    a = F.linear(x, gate)          # [1, T, I]
    b = F.linear(x, up)            # [1, T, I]       →    z = llm42.linear_silu_mul(x, packed(gate‖up), I)
    z = silu(a) * b                # [1, T, I]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes import recipes
from llm42c.passes.base import PACKED, PLAIN, Context, PassReport

_MISS = {
    PACKED: "gate and up are neither bias-free projections of one input nor halves of one tensor",
    PLAIN: "gate and up are separate tensors; Inductor compiles the product",
}


def factors_of_gate(mul: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(silu node, its argument, the other factor)."""
    if g.name(mul) != "mul" or len(mul.args) != 2:
        return None
    for s, other in (mul.args, mul.args[::-1]):
        if g.name(s) == "silu" and g.tensor(other) is not None and g.only_user(s) is mul:  # type: ignore[arg-type]
            return s, s.args[0], other  # type: ignore[union-attr,return-value]
    return None


def _projection(node: Any) -> fx.Node | None:
    """``node`` when it is a linear without bias over a parameter, used once."""
    if g.name(node) != "linear" or len(node.users) != 1:
        return None
    bound = g.bind(node)
    return node if bound["bias"] is None and bound["weight"].op == "get_attr" else None


def halves(a: fx.Node, b: fx.Node) -> fx.Node | None:
    """y [..., 2I] when a = y[..., :I] and b = y[..., I:], however sliced."""
    ta, tb = g.tensor(a), g.tensor(b)
    if ta is None or tb is None or not g.same_shape(ta, tb) or g.storage(ta) != g.storage(tb):
        return None
    y: Any = a
    while y is not None and not (g.tensor(y) is not None and g.same(g.fake(y).shape[-1], 2 * ta.shape[-1])):
        y = (
            y.args[0]
            if isinstance(y, fx.Node) and g.name(y) in ("getitem", "chunk", "split", "narrow")
            else None
        )
    if y is None or g.storage(g.fake(y)) != g.storage(ta):
        return None
    whole, width = g.fake(y), ta.shape[-1]
    with g.fake_execution(a.graph):
        low, high = whole[..., :width], whole[..., width:]
    return y if g.same_view(low, ta) and g.same_view(high, tb) else None


def _two_projections(gate: fx.Node, up: fx.Node) -> tuple[fx.Node, recipes.PackedWeight] | None:
    if _projection(gate) is None or _projection(up) is None:
        return None
    a, b = g.bind(gate), g.bind(up)
    if a["input"] is not b["input"] or not g.same_shape(g.fake(a["weight"]), g.fake(b["weight"])):
        return None
    parts = tuple(recipes.Part(str(bound["weight"].target)) for bound in (a, b))
    return a["input"], recipes.PackedWeight(parts)


def _merged_projection(y: fx.Node) -> tuple[fx.Node, recipes.PackedWeight] | None:
    if g.name(y) != "linear":
        return None
    bound = g.bind(y)
    if bound["bias"] is not None or bound["weight"].op != "get_attr":
        return None
    return bound["input"], recipes.PackedWeight((recipes.Part(str(bound["weight"].target)),))


def linear_silu_mul(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every recognised gate by ``linear_silu_mul`` or ``silu_mul``."""
    effects = g.Effects(graph)
    for node in list(graph.nodes):
        factors = factors_of_gate(node)
        if factors is None:
            continue
        silu, gate, up = factors
        y = halves(gate, up)
        if y is not None and not effects.unchanged([y], silu, node):
            y = None
        fused = None
        if ctx.target == PACKED:
            fused = _merged_projection(y) if y is not None else _two_projections(gate, up)
        if fused is not None:
            x, recipe = fused
            args = (x, recipes.constant(graph, recipe), g.fake(gate).shape[-1])
            new = g.insert(node, torch.ops.llm42.linear_silu_mul.default, args)
        elif y is not None:
            new = g.insert(node, torch.ops.llm42.silu_mul.default, (y,))
        else:
            report.miss(node, _MISS[ctx.target])
            continue
        report.match(node)
        g.replace(node, new)
