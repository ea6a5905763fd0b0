"""Recognise RMSNorm, however a model spells it, and give it one fixed order of summation.

All forms share the core  n = x32 * rsqrt(mean(square(x32), -1, keepdim) + eps),  x32 = x in fp32.

Cases (x: dtype T, w: weight [H]):

1. Llama, Qwen, Mistral:   n.to(T) * w               → rms_norm(x, w, eps, 0.0, cast_first=True)
2. Gemma:                  (n * (1.0 + w.float())).to(T)
                                                     → rms_norm(x, w, eps, 1.0, cast_first=False)
3. OLMo 2, T5:             (n * w).to(T), fp32       → rms_norm(x, w, eps, 0.0, cast_first=False)
4. no weight:              n.to(T)                   → rms_norm(x, None, eps, 0.0, cast_first=True)
5. ``F.rms_norm``/``nn.RMSNorm``                     → rms_norm(x, w, eps, 0.0, cast_first=False)

In fp32 the casts are absent and cases 1 and 3 are the same numbers. Operands may come in either order.

Before and after (bf16, x: [B, S, H])::

    to    = x.to(float32)                      # f32[B, S, H]
    mean  = mean(square(to), -1, keepdim)      # f32[B, S, 1]
    n     = to * rsqrt(mean + eps)         →   y = llm42.rms_norm(x, w, eps, 0.0, True)   # bf16[B, S, H]
    y     = w * n.to(bfloat16)                 # bf16[B, S, H]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport


@dataclass
class _Core:
    """n = x32 * rsqrt(mean(square(x32)) + eps)."""

    x: fx.Node  # the input before its cast to fp32
    normed: fx.Node  # n, fp32
    eps: float
    first: fx.Node  # where x is first read


@dataclass
class _Match:
    """What the operator replaces: everything up to ``last``."""

    last: fx.Node
    weight: fx.Node | None
    weight_offset: float
    cast_first: bool


def _uncast(node: Any) -> Any:
    """The node below a widening cast, or the node itself."""
    inner = g.tensor(g.arg(node)) if g.name(node) == "to" else None
    return g.arg(node) if inner is not None and inner.dtype.itemsize <= 4 else node


def _other(node: fx.Node, one: Any) -> Any:
    """The second operand of a binary node."""
    if len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return b if a is one else a if b is one else None


def _core(rsqrt: fx.Node, report: PassReport) -> _Core | None:
    add = g.arg(rsqrt)
    mean = next((a for a in add.args if g.name(a) == "mean"), None) if g.name(add) == "add" else None
    if mean is None:
        return None
    eps, bound = g.number(_other(add, mean)), g.bind(mean)
    square = bound["input"]
    if eps is None or g.name(square) != "square":
        return None
    x32 = g.arg(square)
    value = g.fake(x32)
    if value.dtype != torch.float32:
        report.miss(rsqrt, f"the variance is computed in {value.dtype}, not fp32")
        return None
    if not g.last_dim(value, bound["dim"]) or not bound["keepdim"]:
        report.miss(rsqrt, "the mean is not over the last dimension alone")
        return None
    # `x * rsqrt` promotes x to fp32 by itself, so x may stand there before or after its cast.
    normed = [u for u in rsqrt.users if g.name(u) == "mul" and _other(u, rsqrt) in (x32, _uncast(x32))]
    if len(normed) != 1 or len(rsqrt.users) != 1:
        report.miss(rsqrt, "the reciprocal root has other users than the norm")
        return None
    return _Core(_uncast(x32), normed[0], eps, min(x32, square))


def _is_weight(node: Any, x: fx.Node) -> bool:
    """A vector [H] along the last dimension of x."""
    w = g.tensor(node)
    return w is not None and w.dim() == 1 and g.same(w.shape[0], g.fake(x).shape[-1])


def _offset_weight(node: Any, x: fx.Node) -> tuple[fx.Node, float] | None:
    """(w, offset) of  w,  w.float(),  1.0 + w  or  1.0 + w.float()."""
    if not _is_weight(node, x):
        return None
    if g.name(node) == "add":
        for w in node.args:
            offset = g.number(_other(node, w)) if isinstance(w, fx.Node) else None
            if offset is not None and g.fake(w).dtype == torch.float32:
                return _uncast(w), offset
    return _uncast(node), 0.0


def _scaled(core: _Core) -> _Match | None:
    """What follows the core: cases 1 to 4."""
    n, dtype = core.normed, g.fake(core.x).dtype
    user = g.only_user(n)
    if dtype == torch.float32:
        weight = (
            _offset_weight(_other(user, n), core.x) if user is not None and g.name(user) == "mul" else None
        )
        if user is None or weight is None:
            return _Match(n, None, 0.0, True)
        return _Match(user, weight[0], weight[1], weight[1] == 0.0)
    if user is not None and g.name(user) == "to":
        return _scaled_after_cast(core, user, dtype)
    weight = _offset_weight(_other(user, n), core.x) if user is not None and g.name(user) == "mul" else None
    cast = g.only_user(user) if user is not None else None
    if weight is None or g.name(cast) != "to" or g.fake(cast).dtype != dtype:
        return None
    return _Match(cast, weight[0], weight[1], False)  # type: ignore[arg-type]


def _scaled_after_cast(core: _Core, cast: fx.Node, dtype: torch.dtype) -> _Match | None:
    """Cases 1 and 4 in half precision."""
    if g.fake(cast).dtype != dtype:
        return None
    product = g.only_user(cast)
    if product is not None and g.name(product) == "mul":
        w = _other(product, cast)
        if _is_weight(w, core.x) and g.fake(w).dtype == dtype:
            return _Match(product, w, 0.0, True)
    return _Match(cast, None, 0.0, True)


def _functional(node: fx.Node, report: PassReport) -> None:
    """Case 5."""
    bound, t = g.bind(node), g.fake(node)
    if len(bound["normalized_shape"]) != 1:
        report.miss(node, "normalises over more than the last dimension")
        return
    eps = g.number(bound["eps"])
    eps = torch.finfo(t.dtype).eps if eps is None else eps
    args = (bound["input"], bound["weight"], eps, 0.0, False)
    new = g.insert(node, torch.ops.llm42.rms_norm.default, args, like=node)
    report.match(node)
    g.replace(node, new)


def rms_norm(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every recognised RMSNorm by ``llm42::rms_norm``."""
    effects = g.Effects(graph)
    for node in list(graph.nodes):
        if g.name(node) == "rms_norm":
            _functional(node, report)
        elif g.name(node) == "rsqrt" and (core := _core(node, report)) is not None:
            match = _scaled(core)
            if match is None:
                report.miss(node, "what follows the norm is none of the known forms")
                continue
            reads = [core.x, *([match.weight] if match.weight is not None else [])]
            if not effects.unchanged(reads, core.first, match.last):
                report.miss(node, "an operand is written to in between")
                continue
            args = (core.x, match.weight, core.eps, match.weight_offset, match.cast_first)
            new = g.insert(match.last, torch.ops.llm42.rms_norm.default, args, like=node)
            report.match(match.last)
            g.replace(match.last, new)
