"""The sums that are left get a fixed order, whatever they belong to.

Cases (x floating point; sums of integers are exact in any order and stay):

1. ``sum(x, dim)``                       → ``row_sum(x, dims, keepdim)``
2. ``mean(x, dim)``                      → ``row_sum(x in fp32) / n``, rounded once
3. ``softmax``, ``log_softmax``          → ``row_softmax``, ``row_log_softmax``; another dimension than the
                                           last is moved there and back
4. ``var``, ``std``, ``var_mean``, ``std_mean``  → the mean and the sum of squares by 2 and 1
5. ``logsumexp``                         → maximum, exponentials, ``row_sum``, logarithm
6. ``norm``, ``linalg.norm``, ``linalg.vector_norm`` of order 1, 2 or infinite, and ``F.normalize``
                                         → ``row_sum`` of squares or magnitudes, a root
7. ``group_norm``                        → ``layer_norm`` of each group in fp32, then weight and bias

8. ``cumsum``, ``cumprod``               → ``running_sum``, ``running_product``

Not rewritten: norms of other orders, matrix norms, and groups whose size is not fixed, each with its reason;
other running reductions of floats, which ``check`` then names.

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
from llm42c.passes.base import Context, PassReport, usable


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


def _norm(at: _At, node: fx.Node) -> fx.Node | str:
    bound, out = g.bind(node), g.fake(node).dtype
    x, order, dim = bound["input"], bound["ord"], bound["dim"]
    several = (dim is None and order is not None) or (isinstance(dim, (list, tuple)) and len(dim) == 2)
    if g.name(node) == "linalg_norm" and order not in (None, "fro") and several and g.fake(x).dim() > 1:
        return f"a matrix norm of order {order}"
    p = 2.0 if order in (None, "fro") else g.number(order)
    if p not in (1.0, 2.0, float("inf"), float("-inf")):
        return f"a norm of order {order}"
    dims, keepdim = _dims(bound, g.fake(x)), bool(bound["keepdim"])
    wide = at.cast(x, torch.float32)
    if p == 2.0:
        result = at.call("sqrt", at.row_sum(at.call("square", wide), dims, keepdim))
    elif p == 1.0:
        result = at.row_sum(at.call("abs", wide), dims, keepdim)
    else:
        result = at.call("amax" if p > 0 else "amin", at.call("abs", wide), dims, keepdim)
    return at.cast(result, out)


def _normalize(at: _At, node: fx.Node) -> fx.Node | str:
    bound = g.bind(node)
    length = g.insert(node, g.FUNCTIONS["norm"], (bound["input"], bound["ord"], bound["dim"], True))
    result = _norm(at, length)
    if isinstance(result, fx.Node):
        result = at.call("div", bound["input"], at.call("clamp", result, min=bound["eps"]))
    node.graph.erase_node(length)
    return result


def _group_norm(at: _At, node: fx.Node) -> fx.Node | str:
    bound = g.bind(node)
    x, groups = bound["input"], bound["num_groups"]
    _, channels, *space = g.fake(x).shape  # [N, C, ...]
    if not all(isinstance(size, int) for size in (channels, groups, *space)):
        return "the size of a group is not fixed"
    wide = at.cast(x, torch.float32)
    sizes = (groups, channels // groups, *space)
    rows = at.call("flatten", at.call("unflatten", wide, 1, sizes[:2]), 2)  # [N, G, C / G ...]
    normed = g.insert(node, torch.ops.llm42.layer_norm.default, (rows, None, None, g.number(bound["eps"])))
    result = at.call("unflatten", at.call("flatten", normed, 1), 1, (channels, *space))
    for parameter, operation in ((bound["weight"], "mul"), (bound["bias"], "add")):
        if parameter is not None:
            vector = at.call("reshape", at.cast(parameter, torch.float32), (channels, *(1 for _ in space)))
            result = at.call(operation, result, vector)
    return at.cast(result, g.fake(node).dtype)


def _running(at: _At, node: fx.Node) -> fx.Node:
    bound = g.bind(node)
    name = "running_sum" if g.name(node) == "cumsum" else "running_product"
    x = at.cast(bound["input"], g.fake(node).dtype)
    return g.insert(node, getattr(torch.ops.llm42, name).default, (x, bound["dim"]))


def _with_mean(node: fx.Node, report: PassReport) -> None:
    """``var_mean`` and ``std_mean``: each of the two results as a call of its own."""
    bound = g.bind(node)
    x, users = bound["input"], g.users(node)
    if not all(g.name(user) == "getitem" for user in users) or g.fake(x).dtype not in _FLOATS:
        report.miss(node, "the two results are not taken apart" if users else "nobody reads the results")
        return
    for user in users:
        at = _At(user)
        if g.arg(user, 1) == 0:
            one = g.insert(user, g.FUNCTIONS[g.name(node)[:3]], node.args, dict(node.kwargs))
            new = _variance(at, one)
            user.graph.erase_node(one)
        else:
            dims = _dims({"dim": None if isinstance(bound["dim"], bool) else bound["dim"]}, g.fake(x))
            new = at.cast(at.mean(x, dims, bool(bound["keepdim"])), g.fake(user).dtype)
        g.replace(user, new)
    report.match(node)
    node.graph.erase_node(node)


_REWRITES: dict[str, Callable[[_At, fx.Node], fx.Node | str]] = {
    "sum": _sum,
    "mean": _mean,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "var": _variance,
    "std": _variance,
    "logsumexp": _logsumexp,
    "norm": _norm,
    "linalg_norm": _norm,
    "linalg_vector_norm": _norm,
    "normalize": _normalize,
    "group_norm": _group_norm,
    "cumsum": _running,
    "cumprod": _running,
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def reductions(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Rewrite every remaining floating-point sum of a known kind."""
    for node in list(graph.nodes):
        if g.name(node) in ("var_mean", "std_mean"):
            _with_mean(node, report)
            continue
        rewrite = _REWRITES.get(g.name(node))
        x, out = (g.tensor(node.args[0]), g.tensor(node)) if rewrite and node.args else (None, None)
        if rewrite is None or x is None or out is None:
            continue
        if not out.is_floating_point():
            continue  # exact
        if out.dtype not in _FLOATS or (x.is_floating_point() and x.dtype not in _FLOATS):
            report.miss(node, f"dtype {x.dtype} → {out.dtype}")
            continue
        if g.name(node) == "cumprod" and (reason := usable(ctx, "running_product")):
            report.miss(node, reason)
            continue
        new = rewrite(_At(node), node)
        if isinstance(new, str):
            report.miss(node, new)
            continue
        report.match(node)
        g.replace(node, new)
