"""Attention written out as two products around a softmax becomes ``llm42::dense_attention`` (plain).

Hugging Face's ``eager`` attention, and the attention that models bring of their own (q: [B, Hq, Sq, D], k, v:
[B, Hkv, Sk, D], possibly repeated to Hq heads; or all of them [B·H, S, D]).

Cases:

1. ``softmax(q @ k.transpose(-1, -2) * scale) @ v``, scale multiplied or divided by, or absent
2. with a soft-cap: ``cap * tanh(s / cap)``
3. with masks and biases before or behind the scale, behind the soft-cap: added, subtracted, filled in or
   chosen by ``where`` (see ``scores.py``); ALiBi is such a bias
4. the softmax in fp32 and cast back, or in the model's dtype; dropout outside training
5. products of three dimensions ([B·H, S, S]) around a softmax of four, or of three
6. q, k and v of different dtypes: the widest, and the result is cast

The probabilities must have no other user (``output_attentions``). The operator keeps scores in fp32
where eager code rounds them to bf16 in between, so bits differ from eager by design.

Before and after::

    s = q @ k4.transpose(2, 3) * scale                                   # [B, Hq, Sq, Sk]
    s = tanh(s / cap) * cap + mask
    p = softmax(s, -1, dtype=float32).to(bfloat16)          →   y = llm42.dense_attention(
    y = p @ v4                                                      q, k, v, mask, scale, False, 0, cap)
"""

from __future__ import annotations

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes import scores as sc
from llm42c.passes.attention_sdpa import unrepeated
from llm42c.passes.base import Context, PassReport, usable
from llm42c.passes.head_dims import dense_attention

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FOLLOWERS = ("to", "dropout", "reshape", "view", "flatten", "unflatten")


def _keys(product: fx.Node) -> fx.Node:
    """k [..., Sk, D] of ``q @ k.transpose(-1, -2)``; a new transpose where it was made otherwise."""
    kt: fx.Node = product.args[1]  # type: ignore[assignment]
    if g.name(kt) in ("transpose", "permute"):
        k: fx.Node = kt.args[0]  # type: ignore[assignment]
        with g.fake_execution(product.graph):
            if g.fake(k).dim() == g.fake(kt).dim() and g.same_view(g.fake(k).transpose(-1, -2), g.fake(kt)):
                return k
    return g.insert(product, g.FUNCTIONS["transpose"], (kt, -1, -2))


def _chain(softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(product with v, v) that follows the softmax."""
    last, node = softmax, g.only_user(softmax)
    while node is not None and g.name(node) in _FOLLOWERS:
        last, node = node, g.only_user(node)
    if node is None or g.name(node) not in ("matmul", "bmm") or g.arg(node) is not last:
        return None
    return node, g.arg(node, 1)


def _refusal(s: sc.Scores, softmax: fx.Node, out: fx.Node, v: fx.Node, ctx: Context) -> str | None:
    q, kt = (g.tensor(arg) for arg in s.product.args[:2])
    value = g.tensor(v)
    if q is None or kt is None or value is None or not {q.dtype, kt.dtype, value.dtype} <= set(_FLOATS):
        return "query, key or value is no tensor of fp32, bf16 or fp16"
    if not q.dim() == kt.dim() == g.fake(s.product).dim() or q.dim() not in (3, 4):
        return f"scores of a product of {q.dim()} and {kt.dim()} dimensions"
    weights = g.fake(softmax)
    if weights.dim() not in (3, 4) or value.dim() != g.fake(out).dim() or value.dim() not in (3, 4):
        return f"a softmax of {weights.dim()} dimensions"
    sizes = (
        (weights.shape[-2], q.shape[-2]),
        (weights.shape[-1], value.shape[-2]),
        (kt.shape[-1], weights.shape[-1]),
    )
    if not all(g.same(a, b) for a, b in sizes):
        return "the rows or columns of the softmax are not queries and keys"
    return usable(ctx, "dense_attention")


def _four(before: fx.Node, operand: fx.Node, weights: fx.Node) -> fx.Node:
    """An operand [B·H, S, D] as [B, H, S, D] where the softmax has four dimensions, else [B·H, 1, S, D]."""
    if g.fake(operand).dim() == 4:
        return operand
    if g.fake(weights).dim() == 3:
        return g.insert(before, g.FUNCTIONS["unsqueeze"], (operand, 1))
    sizes = [g.size(before, x, d) for x, d in ((weights, 1), (operand, 1), (operand, 2))]
    return g.insert(before, g.FUNCTIONS["reshape"], (operand, (-1, *sizes)))


def _mask(before: fx.Node, s: sc.Scores, weights: fx.Node) -> fx.Node | None:
    """The bias as [B|1, H|1, Sq|1, Sk|1]."""
    mask = sc.bias(s, before)
    if mask is None:
        return None
    if g.fake(weights).dim() == 3 and g.fake(mask).dim() == 3:
        return g.insert(before, g.FUNCTIONS["unsqueeze"], (mask, 1))
    for _ in range(4 - g.fake(mask).dim()):
        mask = g.insert(before, g.FUNCTIONS["unsqueeze"], (mask, 0))
    return mask


def _widest(before: fx.Node, *operands: fx.Node) -> list[fx.Node]:
    """The operands in one dtype; a cast from a narrower one that all share is taken off."""
    bare = [x.args[0] if g.name(x) == "to" and _narrower(x) else x for x in operands]
    if len({g.fake(x).dtype for x in bare}) == 1:
        return bare  # type: ignore[return-value]
    dtypes = {g.fake(x).dtype for x in operands}
    if len(dtypes) == 1:
        return list(operands)
    return [
        x if g.fake(x).dtype == torch.float32 else g.insert(before, "to", (x, torch.float32))
        for x in operands
    ]


def _narrower(cast: fx.Node) -> bool:
    """A cast that is exact: the operator computes with the narrower numbers in fp32 all the same."""
    source = g.tensor(cast.args[0])
    return (
        source is not None and source.dtype in _FLOATS and source.dtype != g.fake(cast).dtype == torch.float32
    )


def _rewrite(softmax: fx.Node, s: sc.Scores, out: fx.Node, v: fx.Node, effects: g.Effects) -> str | None:
    """Put the operator in the place of ``out``; returns why that cannot be."""
    q: fx.Node = s.product.args[0]  # type: ignore[assignment]
    k = _keys(s.product)
    # Read when the first product read them: nothing may write to them until the second.
    k_one, v_one = unrepeated(k), unrepeated(v)
    others = [step.other for step in s.steps if step.other is not None]
    if not effects.unchanged([q, k_one, v_one, *others], min(q, k_one, v_one, *others), out):
        return "an operand is written to in between"
    if g.fake(k).dim() == 4 == g.fake(v).dim() and g.same(g.fake(k_one).shape[1], g.fake(v_one).shape[1]):
        k, v = k_one, v_one
    mask = _mask(out, s, softmax)
    operands = _widest(out, *(_four(out, x, softmax) for x in (q, k, v)))
    y = dense_attention(out, *operands, mask, s.scale, False, 0, s.softcap, like=softmax)
    if g.fake(out).dim() == 3:
        y = g.insert(out, g.FUNCTIONS["flatten"], (y, 0, 1))
    if g.fake(y).dtype != g.fake(out).dtype:
        y = g.insert(out, "to", (y, g.fake(out).dtype))
    g.replace(out, y)
    return None


def attention_eager(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every such chain."""
    effects = g.Effects(graph)
    for softmax in list(graph.nodes):
        if g.name(softmax) != "softmax" or not g.last_dim(g.fake(softmax), g.bind(softmax)["dim"]):
            continue
        scores, chain = sc.read(g.bind(softmax)["input"]), _chain(softmax)
        if scores is None or chain is None:
            report.miss(softmax, "not between a product with keys and a product with values")
            continue
        out, v = chain
        reason = _refusal(scores, softmax, out, v, ctx) or _rewrite(softmax, scores, out, v, effects)
        if reason is None:
            report.match(softmax)
        else:
            report.miss(softmax, reason)
