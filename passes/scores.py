"""The way from a product of queries and keys to the argument of a softmax, whatever stands in between.

`read` walks from the softmax down to the product and notes each step; `bias` builds what is added to the
scaled product, in the shape that the softmax sees. Steps (s: scores, [..., Sq, Sk]):

1. ``s * c``, ``s / c`` by a number
2. ``s + m``, ``m + s``, ``s - m``: a mask, ALiBi, a position bias, of any broadcastable shape
3. ``torch.where(seen, s, c)`` and ``s.masked_fill(hidden, c)`` with c = -inf or the least finite number
4. ``cap * tanh(s / cap)``, with nothing added before
5. views and casts: [B·H, Sq, Sk] as [B, H, Sq, Sk]; fp32 and back
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g

_VIEWS = ("reshape", "view", "flatten", "unflatten")
_MAX_STEPS = 16


@dataclass(frozen=True)
class Step:
    """``node`` computes the step from scores; `other` is the tensor that it adds or chooses by."""

    kind: str  # scale, add, sub, view, where, masked_fill
    node: fx.Node
    before: fx.Node
    other: fx.Node | None = None
    number: float = 1.0


@dataclass
class Scores:
    """What leads from ``product`` to the softmax, the innermost step first."""

    product: fx.Node
    scale: float = 1.0
    softcap: float = 0.0
    steps: list[Step] = field(default_factory=list)

    @property
    def biased(self) -> bool:
        return any(step.other is not None for step in self.steps)

    @property
    def viewed(self) -> bool:
        return any(step.kind == "view" for step in self.steps)


def scalar(node: Any, kind: str) -> tuple[Any, float] | None:
    """(tensor operand, number) of ``tensor ∘ number``; the number may come first in a product."""
    if g.name(node) != kind or len(node.args) != 2:
        return None
    a, b = node.args
    for x, c in ((a, b), (b, a)) if kind == "mul" else ((a, b),):
        number = g.number(c)
        if number is not None and g.tensor(x) is not None:
            return x, number
    return None


def _constant(node: Any) -> float | None:
    """A number, also as a tensor of one element that is made in the graph."""
    if (number := g.number(node)) is not None:
        return number
    if g.name(node) == "full" or getattr(node, "target", None) is torch.full:
        return g.number(g.arg(node, 1))
    if getattr(node, "target", None) in (torch.tensor, torch.scalar_tensor):
        return g.number(g.arg(node))
    return None


def _hides(value: Any, like: fx.Node) -> float | None:
    """The value that hides a key: -inf, or the least finite number of the scores."""
    number, dtype = _constant(value), g.fake(like).dtype
    if number is None or not dtype.is_floating_point:
        return None
    # A score added to the least number of fp16 is another number where nothing else is seen.
    least = -torch.inf if dtype == torch.float16 else torch.finfo(dtype).min
    return number if number <= least else None


def _before(node: fx.Node) -> list[Step]:
    """The steps that ``node`` may be, each with the scores that it starts from."""
    name, args = g.name(node), node.args
    if (scaled := scalar(node, "mul")) is not None:
        return [Step("scale", node, scaled[0], number=scaled[1])]
    if (scaled := scalar(node, "div")) is not None and scaled[1] != 0 and "rounding_mode" not in node.kwargs:
        return [Step("scale", node, scaled[0], number=1.0 / scaled[1])]
    if name in ("add", "sub") and len(args) == 2 and not node.kwargs:
        a, b = args
        if g.tensor(a) is None or g.tensor(b) is None:
            return []
        found = [Step(name, node, a, b)]  # type: ignore[arg-type]
        return found + ([Step(name, node, b, a)] if name == "add" else [])  # type: ignore[arg-type]
    if name in _VIEWS or name == "to":
        return [Step("view" if name in _VIEWS else "cast", node, args[0])]  # type: ignore[arg-type]
    if name in ("where", "masked_fill") and len(args) == 3:
        condition, s, c = args if name == "where" else (args[1], args[0], args[2])
        number = _hides(c, node)
        if number is not None and g.tensor(condition) is not None and g.tensor(s) is not None:
            return [Step(name, node, s, condition, number)]  # type: ignore[arg-type]
    return []


def read(node: Any, depth: int = 0) -> Scores | None:
    """What leads to the scores ``node``, or None if no product of keys stands at its beginning."""
    if g.tensor(node) is None or depth > _MAX_STEPS:
        return None
    if g.name(node) in ("matmul", "bmm"):
        return Scores(node)
    if (capped := _capped(node)) is not None:
        inner = read(capped[0], depth + 1)
        if inner is None or inner.biased or inner.softcap:
            return None
        inner.softcap = capped[1]
        return inner
    for step in _before(node):
        if not g.same_shape(g.fake(step.before), g.fake(node)) and step.kind != "view":
            continue  # the scores are broadcast, so this is no attention
        found = read(step.before, depth + 1)
        if found is None or (step.kind == "scale" and found.softcap):
            continue
        if step.kind == "scale":
            found.scale *= step.number
        if step.kind != "cast":
            found.steps.append(step)
        return found
    return None


def _capped(node: Any) -> tuple[Any, float] | None:
    """(scores, cap) of ``cap * tanh(scores / cap)``."""
    outer = scalar(node, "mul")
    if outer is None or g.name(outer[0]) != "tanh":
        return None
    inner = scalar(outer[0].args[0], "div")
    return (inner[0], outer[1]) if inner is not None and inner[1] == outer[1] else None


def bias(scores: Scores, before: fx.Node) -> fx.Node | None:
    """What is added to ``scale * product``, in front of ``before``: in the shape of the softmax, or None.

    Hidden keys keep the value that hides them: a score added to -inf or to the least number is that again.
    """
    total: fx.Node | None = None
    for step in scores.steps:
        total = _follow(step, scores.product, total, before)
    return total


def _follow(step: Step, product: fx.Node, total: fx.Node | None, before: fx.Node) -> fx.Node | None:
    def call(name: str, *args: Any) -> fx.Node:
        return g.insert(before, name if name in g.METHODS else g.FUNCTIONS[name], args)

    if step.kind == "scale":
        return None if total is None else call("mul", total, step.number)
    if step.kind == "view":
        return None if total is None else _viewed(step, product, total, before)
    assert step.other is not None
    if step.kind in ("where", "masked_fill"):
        if total is None:
            options = {"dtype": torch.float32, "device": g.fake(step.other).device}
            total = g.insert(before, torch.zeros, ((),), options)
        chosen = (total, step.number) if step.kind == "where" else (step.number, total)
        return call("where", step.other, *chosen)
    other = call("neg", step.other) if step.kind == "sub" else step.other
    return other if total is None else call("add", total, other)


def _sizes(step: Step, product: fx.Node, before: fx.Node) -> list[Any]:
    """Sizes of the scores that a view starts from, asked of q and k, so that the scores need not be made."""
    q, kt = product.args[:2]
    places = [(x, d) for x in (q, kt) for d in range(g.fake(x).dim())]
    found: list[Any] = []
    for d, size in enumerate(g.fake(step.before).shape):
        source = next((p for p in places if g.same(g.fake(p[0]).shape[p[1]], size)), (step.before, d))
        found.append(g.size(before, source[0], source[1]))  # type: ignore[arg-type]
    return found


def _viewed(step: Step, product: fx.Node, total: fx.Node, before: fx.Node) -> fx.Node:
    """The bias under the view that the scores are put under."""
    whole = g.insert(before, "expand", (total, *_sizes(step, product, before)))
    if g.name(step.node) == "view":  # what is expanded has no strides for a view
        sizes = step.node.args[1:]
        shape = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else tuple(sizes)
        return g.insert(before, g.FUNCTIONS["reshape"], (whole, shape))
    return g.insert(before, step.node.target, (whole, *step.node.args[1:]), dict(step.node.kwargs))
