"""Convolutions along time become sums and products with one order (plain).

Cases (x: [B, C, L] or [C, L], taps j = 0 .. K - 1, x_j: x with its padding from ``j * dilation`` on):

1. depthwise, w: [C, 1, K]: ``x_0 * w_0 + x_1 * w_1 + …``, taps ascending, in fp32, then the bias, and
   one rounding to x.dtype
2. groups = 1, w: [O, C, K]: a linear over (tap, channel), which the ``linear`` pass takes

A position's bits depend on what its taps see, not on the batch or on where in the sequence it stands.

Not rewritten: other groups, a padding by name, more than 64 taps, fp64.

Before and after (causal, K = 2, w: [C, 1, 2])::

    y = conv1d(x, w, b, padding=1, groups=C)     p = pad(x, [1, 1]).to(float32)                # [B, C, L + 2]
                                             →   y = p[..., :-1] * w[:, 0, 0, None]
                                                 y = y + p[..., 1:] * w[:, 0, 1, None]
                                                 y = (y + b[:, None]).to(x.dtype)              # [B, C, L + 1]
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SIGNATURE = (
    ("input", None), ("weight", None), ("bias", None), ("stride", 1), ("padding", 0), ("dilation", 1),
    ("groups", 1),
)  # fmt: skip
_MOST_TAPS = 64


@dataclass(frozen=True)
class _Conv:
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: int
    padding: int
    dilation: int
    groups: int

    @property
    def taps(self) -> int:
        return int(g.fake(self.weight).shape[2])


def _one(argument: Any) -> int | None:
    """The number in ``n`` or ``(n,)``."""
    if isinstance(argument, (tuple, list)) and len(argument) == 1:
        argument = argument[0]
    return argument if isinstance(argument, int) else None


def _read(node: fx.Node) -> _Conv | str:
    """The call's arguments, or why it is left alone."""
    bound: dict[str, Any] = dict(_SIGNATURE)
    bound |= {key: arg for (key, _), arg in zip(_SIGNATURE, node.args, strict=False)} | node.kwargs
    x, w = g.tensor(bound["input"]), g.tensor(bound["weight"])
    numbers = [_one(bound[key]) for key in ("stride", "padding", "dilation", "groups")]
    if x is None or w is None or None in numbers:
        return "arguments that are not known as numbers"
    if not all(isinstance(size, int) for size in w.shape):
        return "a kernel whose size is not fixed"
    if x.dtype not in _FLOATS or w.dtype != x.dtype:
        return f"dtypes {x.dtype} and {w.dtype}"
    if w.shape[2] > _MOST_TAPS:
        return f"a kernel of {w.shape[2]} taps"
    conv = _Conv(bound["input"], bound["weight"], bound["bias"], *numbers)  # type: ignore[arg-type]
    if conv.groups != 1 and not (conv.groups == w.shape[0] and w.shape[1] == 1):
        return f"{conv.groups} groups of several channels"
    return conv


def _views(node: fx.Node, conv: _Conv, x: fx.Node) -> list[fx.Node]:
    """x_j of every tap."""
    if conv.padding:
        x = g.insert(node, torch.nn.functional.pad, (x, (conv.padding, conv.padding)))
    found = []
    for j in range(conv.taps):
        behind = (conv.taps - 1 - j) * conv.dilation
        part = slice(j * conv.dilation, -behind if behind else None, conv.stride)
        found.append(g.insert(node, operator.getitem, (x, (Ellipsis, part))))
    return found


def _cast(node: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    return x if g.fake(x).dtype == dtype else g.insert(node, "to", (x, dtype))


def _column(node: fx.Node, vector: fx.Node) -> fx.Node:
    """[C] → [C, 1] in fp32."""
    return g.insert(node, g.FUNCTIONS["unsqueeze"], (_cast(node, vector, torch.float32), 1))


def _depthwise(node: fx.Node, conv: _Conv) -> fx.Node:
    """Case 1."""
    weight = g.insert(node, g.FUNCTIONS["select"], (conv.weight, 1, 0))  # [C, K]
    total: fx.Node | None = None
    for j, x in enumerate(_views(node, conv, _cast(node, conv.x, torch.float32))):
        factor = _column(node, g.insert(node, g.FUNCTIONS["select"], (weight, 1, j)))
        term = g.insert(node, g.FUNCTIONS["mul"], (x, factor))
        total = term if total is None else g.insert(node, g.FUNCTIONS["add"], (total, term))
    assert total is not None
    if conv.bias is not None:
        total = g.insert(node, g.FUNCTIONS["add"], (total, _column(node, conv.bias)))
    return _cast(node, total, g.fake(node).dtype)


def _dense(node: fx.Node, conv: _Conv) -> fx.Node:
    """Case 2."""
    channels = g.fake(conv.x).dim() - 2
    rows = g.insert(node, g.FUNCTIONS["cat"], (_views(node, conv, conv.x), channels))  # [B, K·C, L]
    rows = g.insert(node, g.FUNCTIONS["transpose"], (rows, -1, -2))
    weight = g.insert(node, g.FUNCTIONS["permute"], (conv.weight, (0, 2, 1)))
    weight = g.insert(node, g.FUNCTIONS["flatten"], (weight, 1))  # [O, K·C]
    y = g.insert(node, g.FUNCTIONS["linear"], (rows, weight, conv.bias))
    y = g.insert(node, g.FUNCTIONS["transpose"], (y, -1, -2))
    return g.insert(node, "contiguous", (y,))


def conv1d(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every convolution along one dimension."""
    for node in list(graph.nodes):
        if g.called(node) != "conv1d":
            continue
        conv = _read(node)
        if isinstance(conv, str):
            report.miss(node, conv)
            continue
        report.match(node)
        depthwise = conv.groups != 1 or g.fake(conv.weight).shape[1] == 1
        depthwise = depthwise and conv.groups == g.fake(conv.weight).shape[0]
        g.replace(node, (_depthwise if depthwise else _dense)(node, conv))
