"""Heads of any size for ``dense_attention``, which takes queries, keys and values of one multiple of 8.

Latent attention (MLA) has values of another size than queries and keys; some models have heads of 20 or 100.
Zeros behind the last element change no score and no value: each chain of fused multiply-adds goes on with
products that are 0. The result is cut to the size of the values.

Before and after (q, k: [B, H, S, 24], v: [B, H, S, 20])::

    y = attention(q, k, v)       →   q, k, v = pad(q, [0, 0]), pad(k, [0, 0]), pad(v, [0, 4])
                                     y = dense_attention(q, k, v)[..., :20]       # laid out [B, S, H, 20]
"""

from __future__ import annotations

import torch
from torch import fx

from llm42c.passes import graph as g

_MULTIPLE = 8


def common_head_dim(*operands: fx.Node) -> int:
    """The size that all are padded to."""
    widest = max(int(g.fake(operand).shape[-1]) for operand in operands)
    return -(-widest // _MULTIPLE) * _MULTIPLE


def padded(before: fx.Node, operand: fx.Node, head_dim: int) -> fx.Node:
    """``operand`` [..., D] with zeros behind, [..., head_dim]; itself where D is that."""
    missing = head_dim - int(g.fake(operand).shape[-1])
    return g.insert(before, torch.nn.functional.pad, (operand, (0, missing))) if missing else operand


def cut(before: fx.Node, attention: fx.Node, head_dim: int) -> fx.Node:
    """The first ``head_dim`` elements of attention [B, H, S, D], laid out as dense_attention does."""
    if int(g.fake(attention).shape[-1]) == head_dim:
        return attention
    part = g.insert(before, g.FUNCTIONS["narrow"], (attention, 3, 0, head_dim))
    rows = g.insert(before, g.FUNCTIONS["transpose"], (part, 1, 2))
    rows = g.insert(before, "contiguous", (rows,))
    return g.insert(before, g.FUNCTIONS["transpose"], (rows, 1, 2))


def dense_attention(
    node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, *options: object, like: fx.Node | None = None
) -> fx.Node:
    """``llm42::dense_attention(q, k, v, *options)`` in front of ``node``, on heads of any size."""
    head_dim, wanted = common_head_dim(q, k, v), int(g.fake(v).shape[-1])
    operands = [padded(node, operand, head_dim) for operand in (q, k, v)]
    call = g.insert(node, torch.ops.llm42.dense_attention.default, (*operands, *options), like=like or node)
    return cut(node, call, wanted)
