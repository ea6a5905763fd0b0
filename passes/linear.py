"""Matrix products with a weight become the linear operator with one fixed order of summation.

Cases:

1. ``F.linear(x, w, b)``
2. ``x @ w.T``, ``torch.matmul(x, w.t())``, ``torch.mm``          (w: [N, K])
3. ``x @ w``, ``torch.addmm(b, x, w)``  with a 2-D weight         (w: [K, N], as in GPT-2's Conv1D)
4. any of these under autocast: the casts that autocast makes become explicit

Plain target: ``llm42::linear_dense(x, w, b)`` on the user's own parameter. Packed target: the weight is
a ``get_attr`` of a parameter; it becomes a packed constant (see ``recipes.py``) and the call
``llm42::linear(x, packed, b, N)``.

Before and after, plain (x: [B, S, K], w: [N, K])::

    y = F.linear(x, w, b)        →   y = llm42.linear_dense(x, w, b)      # [B, S, N]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes import recipes
from llm42c.passes.base import PACKED, Context, PassReport

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Product:
    """y = x @ weight.T + bias, or with ``transposed`` y = x @ weight + bias."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool


def _transposed_weight(node: Any) -> fx.Node | None:
    """w when ``node`` is ``w.T`` of a 2-D w."""
    t = g.tensor(node)
    if t is None or t.dim() != 2:
        return None
    is_attribute = node.target is getattr and g.arg(node, 1) in ("T", "mT")
    if not is_attribute and g.name(node) not in ("t", "transpose", "permute"):
        return None
    inner: fx.Node = g.arg(node)
    with g.fake_execution(node.graph):
        return inner if g.same_view(g.fake(inner).t(), t) else None


def product(node: fx.Node) -> Product | None:
    """The matrix product that ``node`` computes (cases 1 to 3), or None."""
    kind = g.name(node)
    if kind == "linear":
        bound = g.bind(node)
        return Product(bound["input"], bound["weight"], bound["bias"], False)
    if kind in ("matmul", "mm"):
        bound = g.bind(node)
        x, w, bias = bound["input"], bound["other"], None
    elif kind == "addmm":
        bound = g.bind(node)
        if bound["beta"] != 1 or bound["alpha"] != 1:
            return None
        x, w, bias = bound["mat1"], bound["mat2"], bound["input"]
    else:
        return None
    weight = g.tensor(w)
    if weight is None or weight.dim() != 2:
        return None
    inner = _transposed_weight(w)
    return Product(x, inner, bias, False) if inner is not None else Product(x, w, bias, True)


def refusal(p: Product, out: fx.Node) -> str | None:
    """Why the operator cannot compute this product."""
    x, w, y = g.tensor(p.x), g.tensor(p.weight), g.tensor(out)
    if x is None or w is None or y is None:
        return "an operand is no tensor"
    if not {x.dtype, w.dtype, y.dtype} <= set(_FLOATS):
        return f"dtypes {x.dtype}, {w.dtype} → {y.dtype}"
    if w.dim() != 2:
        return f"the weight has {w.dim()} dimensions"
    bias = g.tensor(p.bias)
    if bias is not None and (bias.dim() != 1 or bias.dtype not in _FLOATS):
        return "the bias is no vector"
    return None


def is_uniform(p: Product, out: fx.Node) -> bool:
    """Operands and result have one dtype. Under autocast they do not: it casts, then multiplies."""
    operands = (p.x, p.weight, *([p.bias] if p.bias is not None else []))
    return all(g.fake(node).dtype == g.fake(out).dtype for node in operands)


def _dense(node: fx.Node, p: Product) -> fx.Node:
    def cast(operand: fx.Node) -> fx.Node:
        dtype = g.fake(node).dtype
        return operand if g.fake(operand).dtype == dtype else g.insert(node, "to", (operand, dtype))

    weight = cast(p.weight)
    if p.transposed:
        weight = g.insert(node, g.FUNCTIONS["transpose"], (weight, 0, 1))
    bias = None if p.bias is None else cast(p.bias)
    return g.insert(node, torch.ops.llm42.linear_dense.default, (cast(p.x), weight, bias))


def linear(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every recognised product by ``llm42::linear`` (packed) or ``llm42::linear_dense``."""
    for node in list(graph.nodes):
        p = product(node)
        if p is None:
            if g.name(node) in ("matmul", "mm", "bmm", "addmm"):
                report.miss(node, "a product of two computed tensors")
            continue
        reason = refusal(p, node)
        if reason is not None:
            report.miss(node, reason)
            continue
        part = recipes.part(p.weight, p.transposed) if ctx.target == PACKED and is_uniform(p, node) else None
        if part is not None:
            packed = recipes.constant(graph, recipes.PackedWeight((part,)))
            n = g.value(node).shape[-1]
            new = g.insert(node, torch.ops.llm42.linear.default, (p.x, packed, p.bias, n))
        else:
            new = _dense(node, p)
        report.match(node)
        g.replace(node, new)
