"""LayerNorm over the last dimensions, as a call or written by hand.

By hand, all forms share the core  n = (x32 - mean(x32)) * s,  s = 1 / sqrt(variance(x32) + eps).

Cases (x: dtype T):

1. ``F.layer_norm(x, shape, w, b, eps)`` (``nn.LayerNorm``) over one or several dimensions; w and b optional,
   of any dtype
2. Cohere:    ``(w.float() * n).to(T)``, in fp32 ``n * w + b``, either with or without a factor and an addend
                                                 → layer_norm(x, w, b, eps)
3. DeBERTa:   ``n.to(T)``, with w and b in T     → layer_norm(x, None, None, eps); w and b stay, as they round
4. anything else that reads n                    → layer_norm(x32, None, None, eps), in fp32

The variance is a mean of squared deviations or ``var`` without Bessel's correction; roots are spelled as in
``rms_norm``.

Left as they are, with a reason: Bessel's correction, an epsilon beside the root, means in half precision.
Their sums get an order from ``reductions``.

Before and after (fp32, x: [B, S, H])::

    m = mean(x, -1, keepdim)
    d = x - m
    v = mean(square(d), -1, keepdim)     →    y = llm42.layer_norm(x, w, b, eps)     # [B, S, H]
    y = d / sqrt(v + eps) * w + b
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes import norms
from llm42c.passes.base import Context, PassReport


@dataclass(frozen=True)
class _Match:
    """What the operator replaces: everything from ``x`` up to ``last``."""

    x: fx.Node
    last: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None


def _parameters(at: fx.Node, *nodes: fx.Node | None) -> list[fx.Node | None]:
    """Weight and bias as the operator takes them: both of the result's dtype, or both in fp32."""
    dtypes = {g.fake(n).dtype for n in nodes if n is not None}
    allowed = (g.fake(at).dtype,) if len(dtypes) == 1 else ()
    return [norms.parameter(at, n, allowed) for n in nodes]


def _functional(node: fx.Node, report: PassReport) -> None:
    """Case 1."""
    bound, x = g.bind(node), g.tensor(node.args[0])
    sizes = tuple(bound["normalized_shape"])
    if len(sizes) > 1 and not all(isinstance(size, int) for size in sizes):
        report.miss(node, "normalises over several dimensions whose sizes are not fixed")
        return
    if x is None or x.dtype != g.fake(node).dtype:
        report.miss(node, "the result has another dtype than the input (autocast?)")
        return
    rows = node.args[0]
    if len(sizes) > 1:
        rows = g.insert(node, g.FUNCTIONS["flatten"], (rows, -len(sizes), -1))
    args = (rows, *_parameters(node, bound["weight"], bound["bias"]), g.number(bound["eps"]))
    new = g.insert(node, torch.ops.llm42.layer_norm.default, args)
    if len(sizes) > 1:
        new = g.insert(node, g.FUNCTIONS["unflatten"], (new, -1, sizes))
    report.match(node)
    g.replace(node, new)


def _centred(node: Any) -> fx.Node | None:
    """x32 when ``node`` is x minus its mean, the mean in fp32; x may stand there before its cast."""
    if g.name(node) != "sub" or len(node.args) != 2 or node.kwargs:
        return None
    x32 = norms.mean_of(node.args[1])
    if x32 is None or not g.same_shape(g.fake(node), g.fake(x32)):
        return None
    return x32 if norms.same_row(node.args[0], x32) else None


def _core(found: norms.Scale) -> tuple[fx.Node, fx.Node] | str:
    """(x32, n) around a scale, or why it is none."""
    spread = found.spread
    x32 = _centred(spread.x) if spread.kind == norms.SQUARES else spread.x
    if spread.refusal or x32 is None:
        return spread.refusal
    if (dtype := g.fake(x32).dtype) != torch.float32:
        return f"the variance is computed in {dtype}, not fp32"
    (normed, scaled), *more = norms.scaled_by(found)
    if more or (centred := _centred(scaled)) is None or not norms.same_row(centred, x32):
        return norms.why_unscaled(found)
    return x32, normed


def _vector(user: fx.Node | None, n: fx.Node, called: str) -> fx.Node | None:
    """The vector that ``user`` multiplies n by, or adds to it."""
    v = norms.other(user, n) if g.name(user) == called else None
    fits = user is not None and norms.is_vector(v, n) and g.same_shape(g.fake(user), g.fake(n))
    return v if fits and g.fake(user).dtype == torch.float32 else None


def _affine(x32: fx.Node, n: fx.Node) -> _Match:
    """What follows the core: cases 2 to 4."""
    x, last = norms.uncast(x32), n
    dtype = g.fake(x).dtype
    weight = _vector(g.only_user(last), last, "mul")
    if weight is not None:
        last = g.only_user(last)  # type: ignore[assignment]
    bias = _vector(g.only_user(last), last, "add")
    if bias is not None:
        last = g.only_user(last)  # type: ignore[assignment]
    if dtype == torch.float32:
        return _Match(x, last, weight, bias)
    cast = g.only_user(last)
    if cast is not None and g.name(cast) == "to" and g.fake(cast).dtype == dtype:
        return _Match(x, cast, weight, bias)
    return _Match(x32, last, weight, bias)


def _handwritten(root: fx.Node, effects: g.Effects, report: PassReport) -> None:
    """Cases 2 to 4."""
    found = norms.scale(root)
    if found is None or (found.spread.kind == norms.SQUARES and _centred(found.spread.x) is None):
        return
    core = _core(found)
    if isinstance(core, str):
        report.miss(root, core)
        return
    x32, n = core
    match = _affine(x32, n)
    reads = [node for node in (match.x, match.weight, match.bias) if node is not None]
    if not norms.untouched(effects, reads, match.last):
        report.miss(root, "an operand is written to in between")
        return
    args = (match.x, *_parameters(match.last, match.weight, match.bias), found.eps)
    new = g.insert(match.last, torch.ops.llm42.layer_norm.default, args, like=root)
    report.match(match.last)
    g.replace(match.last, new)


def layer_norm(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every recognised LayerNorm by ``llm42::layer_norm``."""
    effects = g.Effects(graph)
    for node in list(graph.nodes):
        if g.name(node) == "layer_norm":
            _functional(node, report)
        elif g.name(node) in ("rsqrt", "sqrt"):
            _handwritten(node, effects, report)
