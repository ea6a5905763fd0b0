"""Recognise RMSNorm, however a model spells it, and give it one fixed order of summation.

All forms share the core  n = x32 * s,  s = 1 / sqrt(mean(square(x32), -1) + eps),  x32 = x in fp32.

Cases (x: dtype T, w: weight [H], or [1, ..., H]):

1. Llama, Qwen, Mistral:   n.to(T) * w               → rms_norm(x, w, eps, 0.0, cast_first=True)
2. Gemma:                  (n * (1.0 + w.float())).to(T)
                                                     → rms_norm(x, w, eps, 1.0, cast_first=False)
3. OLMo 2, gpt-oss:        (n * w).to(T)             → rms_norm(x, w, eps, 0.0, cast_first=False)
4. no weight:              n.to(T)                   → rms_norm(x, None, eps, 0.0, cast_first=True)
5. ``F.rms_norm``/``nn.RMSNorm``, over one or several trailing dimensions
                                                     → rms_norm(x, w, eps, 0.0, cast_first=False)
6. anything else that reads n, such as a gate or groups of a last dimension that is put together again:
   the norm alone, in fp32                           → rms_norm(x32, None, eps, 0.0, cast_first=True)

Operands may come in either order, and in fp32 the casts are absent. The mean may be a sum divided by the
count or a squared 2-norm, the root ``rsqrt``, a power, ``1 / sqrt`` or a division by ``sqrt``; the operator
multiplies by the reciprocal, which a quotient may differ from in its last bit. A weight of another dtype is
read in fp32; where the model multiplies it after a cast to its own, wider dtype, the product stays (case 4).

Left as they are, with a reason: means in half precision, an epsilon beside the root or as a least value, a
sum of squares without its count, a scale that is rounded before the product, a weight that is multiplied
before it. Their sums get an order from ``reductions``.

Before and after (bf16, x: [B, S, H])::

    to    = x.to(float32)                      # f32[B, S, H]
    mean  = mean(square(to), -1, keepdim)      # f32[B, S, 1]
    n     = to * rsqrt(mean + eps)         →   y = llm42.rms_norm(x, w, eps, 0.0, True)   # bf16[B, S, H]
    y     = w * n.to(bfloat16)                 # bf16[B, S, H]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes import norms
from llm42c.passes.base import Context, PassReport


@dataclass(frozen=True)
class _Core:
    """n = x32 * s."""

    x: fx.Node  # the input before its cast to fp32
    x32: fx.Node
    normed: fx.Node  # n, fp32
    eps: float


@dataclass(frozen=True)
class _Match:
    """What the operator replaces: everything from ``x`` up to ``last``."""

    x: fx.Node
    last: fx.Node
    weight: fx.Node | None = None
    weight_offset: float = 0.0
    cast_first: bool = True


def _core(found: norms.Scale) -> _Core | str:
    """The core around a scale, or why it is none."""
    x32 = found.spread.x
    if found.spread.refusal:
        return found.spread.refusal
    if (dtype := g.fake(x32).dtype) != torch.float32:
        return f"the variance is computed in {dtype}, not fp32"
    # `x * scale` promotes x to fp32 by itself, so x may stand there before or after its cast.
    (normed, scaled), *more = norms.scaled_by(found)
    if more or not norms.same_row(scaled, x32):
        return norms.why_unscaled(found)
    return _Core(norms.uncast(x32), x32, normed, found.eps)


def _factor(product: fx.Node | None, n: fx.Node, x: fx.Node) -> tuple[fx.Node, float] | None:
    """(w, offset) when ``product`` is n times  w,  w.float(),  1.0 + w  or  1.0 + w.float()."""
    w = norms.other(product, n) if g.name(product) == "mul" else None
    if (
        product is None
        or w is None
        or not norms.is_vector(w, x)
        or not g.same_shape(g.fake(product), g.fake(n))
    ):
        return None
    if g.name(w) == "add":
        for inner in w.args:
            offset = g.number(norms.other(w, inner)) if isinstance(inner, fx.Node) else None
            if offset is not None and g.fake(inner).dtype == g.fake(n).dtype:
                return norms.uncast(inner), offset
    return norms.uncast(w), 0.0


def _scaled(core: _Core) -> _Match:
    """What follows the core: cases 1 to 4 and 6."""
    n, dtype = core.normed, g.fake(core.x).dtype
    user = g.only_user(n)
    if g.name(user) == "to" and g.fake(user).dtype == dtype != torch.float32:
        return _scaled_after_cast(core, user, dtype)  # type: ignore[arg-type]
    found = _factor(user, n, core.x32)
    if user is None or found is None or g.fake(user).dtype != torch.float32:
        return _Match(core.x32, n)
    weight, offset = found
    if dtype == torch.float32:
        return _Match(core.x, user, weight, offset, offset == 0.0)
    cast = g.only_user(user)
    if cast is None or g.name(cast) != "to" or g.fake(cast).dtype != dtype:
        return _Match(core.x32, user, weight, offset, offset == 0.0)
    return _Match(core.x, cast, weight, offset, False)


def _scaled_after_cast(core: _Core, cast: fx.Node, dtype: torch.dtype) -> _Match:
    """Cases 1 and 4 in half precision."""
    product = g.only_user(cast)
    found = _factor(product, cast, core.x)
    if product is not None and found is not None and g.fake(found[0]).dtype == dtype == g.fake(product).dtype:
        return _Match(core.x, product, *found, True)
    return _Match(core.x, cast)


def _functional(node: fx.Node, report: PassReport) -> None:
    """Case 5."""
    bound, out = g.bind(node), g.fake(node)
    sizes = tuple(bound["normalized_shape"])
    x, weight = bound["input"], bound["weight"]
    if len(sizes) > 1 and not all(isinstance(size, int) for size in sizes):
        report.miss(node, "normalises over several dimensions whose sizes are not fixed")
        return
    if g.fake(x).dtype != out.dtype:
        report.miss(node, "the result has another dtype than the input (autocast?)")
        return
    eps = g.number(bound["eps"])
    eps = torch.finfo(out.dtype).eps if eps is None else eps
    if len(sizes) > 1:
        x = g.insert(node, g.FUNCTIONS["flatten"], (x, -len(sizes), -1))
    args = (x, norms.parameter(node, weight, (out.dtype,)), eps, 0.0, False)
    new = g.insert(node, torch.ops.llm42.rms_norm.default, args, like=node)
    if len(sizes) > 1:
        new = g.insert(node, g.FUNCTIONS["unflatten"], (new, -1, sizes))
    report.match(node)
    g.replace(node, new)


def _handwritten(root: fx.Node, effects: g.Effects, report: PassReport) -> None:
    """Cases 1 to 4 and 6."""
    found = norms.scale(root)
    if found is None or found.spread.kind != norms.SQUARES:
        return
    core = _core(found)
    if isinstance(core, str):
        report.miss(root, core)
        return
    match = _scaled(core)
    reads = [match.x, *([match.weight] if match.weight is not None else [])]
    if not norms.untouched(effects, reads, match.last):
        report.miss(root, "an operand is written to in between")
        return
    dtype = g.fake(match.x).dtype
    weight = norms.parameter(match.last, match.weight, (dtype,))
    args = (match.x, weight, core.eps, match.weight_offset, match.cast_first)
    new = g.insert(match.last, torch.ops.llm42.rms_norm.default, args, like=root)
    report.match(match.last)
    g.replace(match.last, new)


def rms_norm(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every recognised RMSNorm by ``llm42::rms_norm``."""
    effects = g.Effects(graph)
    for node in list(graph.nodes):
        if g.name(node) == "rms_norm":
            _functional(node, report)
        elif g.name(node) in ("rsqrt", "sqrt"):
            _handwritten(node, effects, report)
