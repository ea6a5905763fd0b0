"""The sums that are left get a fixed order, whatever they belong to.

Cases (x floating point; sums of integers are exact in any order and stay):

1. ``sum(x, dim)``                       → ``row_sum(x, dims, keepdim)``
2. ``mean(x, dim)``                      → ``row_sum(x in fp32) / n``, rounded once
3. ``softmax``, ``log_softmax``          → ``row_softmax``, ``row_log_softmax``; another dimension than the
                                           last is moved there and back
4. ``var``, ``std``                      → the mean and the sum of squares by 2 and 1
5. ``logsumexp``                         → maximum, exponentials, ``row_sum``, logarithm

Not rewritten: running sums and products of floats, which ``check`` then names.

Before and after (bf16, x: [B, S, H])::

    y = mean(x, -1, keepdim=True)     x32 = x.to(float32)
                                  →   s   = llm42.row_sum(x32, [2], True)     # f32[B, S, 1]
                                      y   = (s / H).to(bfloat16)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport


class _At:
    """Inserts calls in front of one node."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def call(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        target = name if name in g.METHODS or name == "size" else g.FUNCTIONS[name]
        return g.insert(self.node, target, args, kwargs)

    def row_sum(self, x: fx.Node, dims: list[int], keepdim: bool) -> fx.Node:
        return g.insert(self.node, torch.ops.llm42.row_sum.default, (x, dims, keepdim))

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if g.fake(x).dtype == dtype else self.call("to", x, dtype)

    def count(self, x: fx.Node, dims: list[int]) -> Any:
        """Number of elements over ``dims``: a number, or a node where a size is symbolic."""
        total: Any = 1
        for d in dims:
            size = g.fake(x).shape[d]
            factor = size if isinstance(size, int) else self.call("size", x, d)
            if isinstance(total, int) and isinstance(factor, int):
                total *= factor
            else:
                total = g.insert(self.node, operator.mul, (total, factor))
        return total

    def mean(self, x: fx.Node, dims: list[int], keepdim: bool) -> fx.Node:
        """In fp32."""
        wide = self.cast(x, torch.float32)
        return self.call("div", self.row_sum(wide, dims, keepdim), self.count(x, dims))


def _dims(bound: dict[str, Any], x: torch.Tensor) -> list[int]:
    dim = bound["dim"]
    if dim is None or dim == [] or dim == ():
        return list(range(x.dim()))
    return sorted(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim))


def _sum(at: _At, node: fx.Node) -> fx.Node:
    bound, out = g.bind(node), g.fake(node).dtype
    x = bound["input"]
    dims = _dims(bound, g.fake(x))
    return at.row_sum(at.cast(x, out), dims, bool(bound["keepdim"]))


def _mean(at: _At, node: fx.Node) -> fx.Node:
    bound = g.bind(node)
    dims = _dims(bound, g.fake(bound["input"]))
    return at.cast(at.mean(bound["input"], dims, bool(bound["keepdim"])), g.fake(node).dtype)


def _softmax(at: _At, node: fx.Node) -> fx.Node:
    bound, out = g.bind(node), g.fake(node)
    x, last = at.cast(bound["input"], out.dtype), out.dim() - 1
    dim = bound["dim"] % out.dim()
    log = g.name(node) == "log_softmax"
    target = torch.ops.llm42.row_log_softmax.default if log else torch.ops.llm42.row_softmax.default
    if dim != last:
        x = at.call("transpose", x, dim, last)
    y = g.insert(node, target, (x,))
    return y if dim == last else at.call("transpose", y, dim, last)


def _variance(at: _At, node: fx.Node) -> fx.Node:
    bound = g.bind(node)
    x = bound["input"]
    if isinstance(bound["dim"], bool):  # var(x, unbiased)
        bound["dim"], bound["unbiased"] = None, bound["dim"]
    dims = _dims(bound, g.fake(x))
    correction = bound.get("correction")
    if correction is None:
        correction = 0 if bound["unbiased"] is False else 1
    wide = at.cast(x, torch.float32)
    centred = at.call("sub", wide, at.mean(x, dims, True))
    total = at.row_sum(at.call("square", centred), dims, bool(bound["keepdim"]))
    count = at.count(x, dims)
    divisor = (
        count - correction if isinstance(count, int) else g.insert(node, operator.sub, (count, correction))
    )
    result = at.call("div", total, divisor)
    if g.name(node) == "std":
        result = at.call("sqrt", result)
    return at.cast(result, g.fake(node).dtype)


def _logsumexp(at: _At, node: fx.Node) -> fx.Node:
    bound = g.bind(node)
    x = bound["input"]
    dims = _dims(bound, g.fake(x))
    wide = at.cast(x, torch.float32)
    top = at.call("amax", wide, dims, True)
    shifted = at.call("exp", at.call("sub", wide, top))
    total = at.call("log", at.row_sum(shifted, dims, True))
    result = at.call("add", total, top)
    if not bound["keepdim"]:
        result = at.call("squeeze", result, tuple(dims))
    return at.cast(result, g.fake(node).dtype)


_REWRITES: dict[str, Callable[[_At, fx.Node], fx.Node]] = {
    "sum": _sum,
    "mean": _mean,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "var": _variance,
    "std": _variance,
    "logsumexp": _logsumexp,
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def reductions(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Rewrite every remaining floating-point sum of a known kind."""
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(g.name(node))
        x, out = (g.tensor(node.args[0]), g.tensor(node)) if rewrite and node.args else (None, None)
        if rewrite is None or x is None or out is None:
            continue
        if not out.is_floating_point():
            continue  # exact
        if out.dtype not in _FLOATS or (x.is_floating_point() and x.dtype not in _FLOATS):
            report.miss(node, f"dtype {x.dtype} → {out.dtype}")
            continue
        report.match(node)
        g.replace(node, rewrite(_At(node), node))
