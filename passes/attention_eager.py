"""Attention written out as two products around a softmax becomes ``llm42::dense_attention`` (plain).

Hugging Face's ``eager`` attention, which models with a soft-cap use (q: [B, Hq, Sq, D], k, v:
[B, Hkv, Sk, D], possibly repeated to Hq heads).

Cases:

1. ``softmax(q @ k.transpose(2, 3) * scale) @ v``, scale multiplied or divided by, or absent
2. with a soft-cap: ``cap * tanh(s / cap)``
3. with an additive mask behind the soft-cap
4. the softmax in fp32 and cast back, or in the model's dtype; dropout outside training
5. heads of any size, values of another size than keys (``head_dims.py``)

The probabilities must have no other user (``output_attentions``). The operator keeps scores in fp32
where eager code rounds them to bf16 in between, so bits differ from eager by design.

Before and after::

    s = q @ k4.transpose(2, 3) * scale                                   # [B, Hq, Sq, Sk]
    s = tanh(s / cap) * cap + mask
    p = softmax(s, -1, dtype=float32).to(bfloat16)          →   y = llm42.dense_attention(
    y = p @ v4                                                      q, k, v, mask, scale, False, 0, cap)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.attention_sdpa import unrepeated
from llm42c.passes.base import Context, PassReport, usable
from llm42c.passes.head_dims import dense_attention


@dataclass
class _Scores:
    """What leads from q and k to the argument of the softmax."""

    q: fx.Node
    k: fx.Node
    mask: fx.Node | None = None
    scale: float = 1.0
    softcap: float = 0.0


def _scalar(node: Any, kind: str) -> tuple[Any, float] | None:
    """(tensor operand, number) of ``tensor ∘ number``; the number may come first in a product."""
    if g.name(node) != kind or len(node.args) != 2:
        return None
    a, b = node.args
    for x, c in ((a, b), (b, a)) if kind == "mul" else ((a, b),):
        number = g.number(c)
        if number is not None and g.tensor(x) is not None:
            return x, number
    return None


def _capped(node: Any) -> tuple[Any, float]:
    """(scores, cap) of ``cap * tanh(scores / cap)``, or (node, 0)."""
    outer = _scalar(node, "mul")
    if outer is None or g.name(outer[0]) != "tanh":
        return node, 0.0
    inner = _scalar(outer[0].args[0], "div")
    return (inner[0], outer[1]) if inner is not None and inner[1] == outer[1] else (node, 0.0)


def _scores(node: Any) -> _Scores | None:
    mask = None
    if g.name(node) == "add" and len(node.args) == 2 and all(g.tensor(a) is not None for a in node.args):
        node, mask = node.args
        if g.fake(mask).dim() != 4:
            return None
    node, cap = _capped(node)
    scale = 1.0
    if (scaled := _scalar(node, "mul")) is not None:
        node, scale = scaled
    elif (scaled := _scalar(node, "div")) is not None:
        node, scale = scaled[0], 1.0 / scaled[1]
    if g.name(node) not in ("matmul", "bmm"):
        return None
    q, kt = node.args[:2]
    if g.name(kt) not in ("transpose", "permute") or g.fake(node).dim() != 4:
        return None
    k = kt.args[0]
    with g.fake_execution(node.graph):
        if not g.same_view(g.fake(k).transpose(2, 3), g.fake(kt)):
            return None
    return _Scores(q, k, mask, scale, cap)


def _chain(softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(product with v, v) that follows the softmax."""
    last, node = softmax, g.only_user(softmax)
    while node is not None and g.name(node) in ("to", "dropout"):
        last, node = node, g.only_user(node)
    if node is None or g.name(node) not in ("matmul", "bmm") or g.arg(node) is not last:
        return None
    return node, g.arg(node, 1)


def _refusal(s: _Scores, v: fx.Node, out: fx.Node, ctx: Context) -> str | None:
    q, k = g.fake(s.q), g.fake(s.k)
    if not q.dtype == k.dtype == g.fake(v).dtype == g.fake(out).dtype or q.dtype == torch.float64:
        return "query, key, value and result have different dtypes"
    return usable(ctx, "dense_attention")


def attention_eager(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every such chain."""
    effects = g.Effects(graph)
    for softmax in list(graph.nodes):
        if g.name(softmax) != "softmax" or not g.last_dim(g.fake(softmax), g.bind(softmax)["dim"]):
            continue
        scores, chain = _scores(softmax.args[0]), _chain(softmax)
        if scores is None or chain is None:
            report.miss(softmax, "not between a product with keys and a product with values")
            continue
        out, v = chain
        reason = _refusal(scores, v, out, ctx)
        k, v_one = unrepeated(scores.k), unrepeated(v)
        if not effects.unchanged([scores.q, k, v_one], min(scores.q, k, v_one), out):
            reason = "an operand is written to in between"
        if reason is not None:
            report.miss(softmax, reason)
            continue
        if not g.same(g.fake(k).shape[1], g.fake(v_one).shape[1]):
            k, v_one = scores.k, v
        options = (scores.mask, scores.scale, False, 0, scores.softcap)
        report.match(softmax)
        g.replace(out, dense_attention(out, scores.q, k, v_one, *options, like=softmax))
