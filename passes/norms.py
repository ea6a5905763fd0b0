"""What norms have in common: a row divided by the root of its mean square, or of its variance.

The passes ``rms_norm`` and ``layer_norm`` share these questions about a graph; nothing here rewrites one,
except that a weight is brought to the shape and dtype which the operators take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g

SQUARES, VARIANCE = "squares", "variance"
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Spread:
    """What stands below the root: a mean of squares or a variance of ``x`` over its last dimension.

    ``refusal``: why it is not exactly that, for what only looks like it.
    """

    kind: str
    x: fx.Node
    refusal: str = ""

    def refused(self, why: str) -> Spread:
        return self if self.refusal else replace(self, refusal=why)


@dataclass(frozen=True)
class Scale:
    """``1 / sqrt(spread + eps)``, ready to be multiplied by, or with ``divides`` its reciprocal to divide by.

    ``node`` has x's shape with a last dimension of one.
    """

    spread: Spread
    eps: float
    node: fx.Node
    divides: bool


def uncast(node: Any) -> Any:
    """The node below a cast from half precision to fp32, or the node itself."""
    inner = g.tensor(g.arg(node)) if g.name(node) == "to" else None
    widens = inner is not None and inner.dtype in HALF and g.fake(node).dtype == torch.float32
    return g.arg(node) if widens else node


def same_row(a: Any, b: Any) -> bool:
    """Both are x or x in fp32."""
    return uncast(a) is uncast(b)


def first_read(x: fx.Node, last: fx.Node) -> fx.Node:
    """The first of the calls between ``x`` and ``last`` through which ``last`` depends on ``x``."""
    first, queue, seen = last, [last], {last}
    while queue:
        node = queue.pop()
        if x in node.all_input_nodes:
            first = min(first, node)
        new = [n for n in node.all_input_nodes if x < n and n not in seen]
        seen.update(new)
        queue += new
    return first


def untouched(effects: g.Effects, reads: list[fx.Node], last: fx.Node) -> bool:
    """Nothing that the operator in place of ``last`` reads is written to after the model reads it."""
    return all(effects.unchanged([x], first_read(x, last), last) for x in reads)


def other(node: Any, one: Any) -> Any:
    """The second operand of a binary node; None where it has keywords or other operands."""
    if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return b if a is one else a if b is one else None


def is_size(arg: Any, size: Any) -> bool:
    """``arg`` is the number of elements ``size``."""
    return g.number(arg) is not None and g.same(g.value(arg), size)


def without_new_dim(node: Any) -> Any:
    """The node below ``unsqueeze(-1)``, ``[..., None]`` and other views that add one dimension of one."""
    while g.name(node) in ("unsqueeze", "getitem", "reshape", "view"):
        inner, outer = g.tensor(g.arg(node)), g.tensor(node)
        if inner is None or outer is None or outer.dim() != inner.dim() + 1 or not g.same(outer.shape[-1], 1):
            break
        if not g.same_shape(inner, outer[..., 0]):
            break
        node = g.arg(node)
    return node


def _over_last(node: fx.Node) -> fx.Node | None:
    """What a sum, mean, norm or variance reduces, if over the last dimension alone."""
    x = g.tensor(g.bind(node)["input"])
    return node.args[0] if x is not None and g.last_dim(x, g.bind(node)["dim"]) else None  # type: ignore[return-value]


def mean_of(node: Any) -> fx.Node | None:
    """x when ``node`` is the mean of x over its last dimension, with or without that dimension."""
    node = without_new_dim(node)
    if g.name(node) == "mean":
        return _over_last(node)
    if g.name(node) == "getitem" and g.name(g.arg(node)) == "var_mean" and g.arg(node, 1) == 1:
        return _over_last(g.arg(node))
    total = None
    if g.name(node) in ("div", "mul") and len(node.args) == 2 and not node.kwargs:
        total = next((a for a in node.args if g.name(a) == "sum"), None)
    x = _over_last(total) if total is not None else None
    if x is None or total is None:
        return None
    count, by = g.fake(x).shape[-1], other(node, total)
    if g.name(node) == "div" and node.args[0] is total:
        return x if is_size(by, count) else None
    return x if g.name(node) == "mul" and isinstance(count, int) and g.number(by) == 1 / count else None


def _correction(node: fx.Node) -> float | None:
    """How much less than the count a variance divides by."""
    bound = g.bind(node)
    if bound.get("correction") is not None:
        return g.number(bound["correction"])
    return 0.0 if bound["unbiased"] is False else 1.0


def spread(node: Any) -> Spread | None:
    """The mean of squares or variance that ``node`` computes; None for anything else."""
    node = without_new_dim(node)
    if g.name(node) == "getitem" and g.name(g.arg(node)) == "var_mean" and g.arg(node, 1) == 0:
        node = g.arg(node)
    if g.name(node) in ("var", "var_mean"):
        x = g.bind(node)["input"]
        if _over_last(node) is None:
            return Spread(VARIANCE, x, "the variance is not over the last dimension alone")
        bessel = _correction(node) != 0.0
        return Spread(VARIANCE, x, "the variance divides by one less than the count" if bessel else "")
    squares = mean_of(node)
    if squares is not None and g.name(squares) == "square":
        return Spread(SQUARES, g.arg(squares))
    if g.name(node) in ("div", "mul") and g.name(g.arg(node)) == "square":
        return _from_norm(node)
    reduced = g.arg(node) if g.name(node) in ("div", "mul") else node
    if g.name(reduced) not in ("mean", "sum") or g.name(g.arg(reduced)) != "square":
        return None
    square = g.arg(reduced)
    why = "the sum of squares is not divided by their count"
    if _over_last(reduced) is None:
        why = "the mean is not over the last dimension alone"
    return Spread(SQUARES, g.arg(square), why)


def _from_norm(node: fx.Node) -> Spread | None:
    """``norm(x)² / n``."""
    norm, by = g.arg(g.arg(node)), g.number(g.arg(node, 1))
    if g.name(norm) not in ("norm", "linalg_vector_norm") or by is None:
        return None
    bound = g.bind(norm)
    x = g.tensor(bound["input"])
    order = 2 if bound["ord"] in (None, "fro") else g.number(bound["ord"])
    if x is None or order != 2 or not g.last_dim(x, bound["dim"]):
        return None
    count = x.shape[-1]
    right = isinstance(count, int) and by == (count if g.name(node) == "div" else 1 / count)
    return Spread(SQUARES, bound["input"]) if right else None


def _below_root(node: Any) -> tuple[Spread, float] | None:
    """(spread, eps) of  spread,  spread + eps  or  eps + spread."""
    node = without_new_dim(node)
    found = spread(node)
    if found is not None:
        return found, 0.0
    if g.name(node) not in ("add", "clamp", "maximum"):
        return None
    for a in node.args[:2]:
        if (found := spread(a)) is None:
            continue
        eps = g.number(other(node, a))
        if g.name(node) == "add" and eps is not None:
            return found, eps
        why = "the epsilon is no number" if g.name(node) == "add" else "a least value stands for the epsilon"
        return found.refused(why), 0.0
    return None


def scale(root: fx.Node) -> Scale | None:
    """The scale of a norm whose root is ``root`` (``rsqrt`` or ``sqrt``), or None."""
    if g.name(root) not in ("rsqrt", "sqrt") or (below := _below_root(g.arg(root))) is None:
        return None
    node, divides = root, g.name(root) == "sqrt"
    while (user := g.only_user(node)) is not None:
        if divides and g.name(user) == "reciprocal":
            divides = False
        elif without_new_dim(user) is user:
            break
        node = user
    found, eps = below
    x, s = g.fake(found.x), g.fake(node)
    if s.dim() != x.dim() or not g.same_shape(s, x[..., :1]):
        found = found.refused("the root does not stand beside the row")
    return Scale(found, eps, node, divides)


def scaled_by(s: Scale) -> list[tuple[fx.Node, Any]]:
    """(product or quotient, what it scales) for every user of the scale; None where it is neither."""
    found: list[tuple[fx.Node, Any]] = []
    for user in s.node.users:
        fits = g.name(user) == ("div" if s.divides else "mul")
        if fits and s.divides:
            fits = g.arg(user, 1) is s.node
        found.append((user, other(user, s.node) if fits else None))
    return found


def why_unscaled(s: Scale) -> str:
    """Why the users of a scale are not the one product of a norm."""
    users = list(s.node.users)
    if len(users) == 1 and g.name(users[0]) == "to":
        return f"the scale is rounded to {g.fake(users[0]).dtype} before the product"
    if len(users) == 1 and g.name(users[0]) == "add":
        return "the epsilon is added to the root, not below it"
    if len(users) == 1:
        return "what is scaled is not what was squared"
    return "the reciprocal root has other users than the norm"


def is_vector(node: Any, x: fx.Node) -> bool:
    """[H] along the last dimension of x; leading dimensions of one do not matter."""
    w = g.tensor(node)
    if w is None or w.dim() == 0 or w.dim() > g.fake(x).dim():
        return False
    return g.same(w.shape[-1], g.fake(x).shape[-1]) and all(g.same(size, 1) for size in w.shape[:-1])


def parameter(before: fx.Node, node: fx.Node | None, dtypes: tuple[torch.dtype, ...]) -> fx.Node | None:
    """``node`` as [H] in one of ``dtypes``, else in fp32, in front of ``before``."""
    if node is None:
        return None
    if g.fake(node).dim() != 1:
        node = g.insert(before, g.FUNCTIONS["reshape"], (node, (-1,)))
    if g.fake(node).dtype not in (*dtypes, torch.float32):
        node = g.insert(before, "to", (node, torch.float32))
    return node
