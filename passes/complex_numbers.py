"""Complex numbers become pairs of real ones: rotary positions are often a complex product.

A library computes with several complex numbers at a time and with the rest one by one, which may round
differently. In real numbers each step is a call of its own.

Cases (a, b: [..., D] complex):

1. ``a * b``, two complex tensors   → ``ar * br - ai * bi``, ``ar * bi + ai * br``
2. ``a * s``, s a real number       → ``ar * s``, ``ai * s``
3. ``polar(r, t)``                  → ``r * cos(t)``, ``r * sin(t)``
4. ``view_as_real(view_as_complex(x))`` is x

Other arithmetic on complex numbers stays, and ``check`` names it.

Before and after (x: [B, S, H, D / 2, 2])::

    c = view_as_complex(x) * freqs       xr, xi = x[..., 0], x[..., 1]
    y = view_as_real(c)              →   fr, fi = view_as_real(freqs)[..., 0], …[..., 1]
                                         y = stack([xr * fr - xi * fi, xr * fi + xi * fr], -1)
"""

from __future__ import annotations

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport
from llm42c.passes.kinds import Kind, kind


def _pair(before: fx.Node, number: fx.Node) -> fx.Node:
    """[..., 2] real for [...] complex."""
    if g.called(number) == "view_as_complex":
        return number.args[0]  # type: ignore[return-value]
    return g.insert(before, torch.view_as_real, (number,))


def _parts(before: fx.Node, number: fx.Node) -> tuple[fx.Node, fx.Node]:
    pair = _pair(before, number)
    real, imaginary = (g.insert(before, g.FUNCTIONS["select"], (pair, -1, i)) for i in (0, 1))
    return real, imaginary


def _complex(before: fx.Node, real: fx.Node, imaginary: fx.Node) -> fx.Node:
    pair = g.insert(before, torch.stack, ((real, imaginary), -1))
    return g.insert(before, torch.view_as_complex, (pair,))


def _product(node: fx.Node) -> fx.Node:
    """Case 1."""

    def call(name: str, x: fx.Node, y: fx.Node) -> fx.Node:
        return g.insert(node, g.FUNCTIONS[name], (x, y))

    (ar, ai), (br, bi) = (_parts(node, operand) for operand in node.args[:2])  # type: ignore[arg-type]
    real = call("sub", call("mul", ar, br), call("mul", ai, bi))
    return _complex(node, real, call("add", call("mul", ar, bi), call("mul", ai, br)))


def _scaled(node: fx.Node) -> fx.Node:
    """Case 2."""
    number, factor = node.args if _is_complex(node.args[0]) else reversed(node.args)
    parts = (g.insert(node, g.FUNCTIONS["mul"], (x, factor)) for x in _parts(node, number))  # type: ignore[arg-type]
    return _complex(node, *parts)


def _polar(node: fx.Node) -> fx.Node:
    """Case 3."""
    length, angle = node.args[:2]
    parts = (g.insert(node, g.FUNCTIONS[name], (angle,)) for name in ("cos", "sin"))
    real, imaginary = (g.insert(node, g.FUNCTIONS["mul"], (length, part)) for part in parts)
    return _complex(node, real, imaginary)


def _is_product(node: fx.Node) -> bool:
    return g.name(node) == "mul" and all(map(_is_complex, node.args[:2]))


def _is_scaled(node: fx.Node) -> bool:
    """One operand is a complex tensor, the other a real number."""
    if len(node.args) != 2 or not _is_complex(node) or sum(map(_is_complex, node.args)) != 1:
        return False
    return sum(isinstance(g.value(x), (float, int, torch.SymFloat)) for x in node.args) == 1


def _is_complex(node: object) -> bool:
    t = g.tensor(node)
    return t is not None and t.dtype == torch.complex64


def _is_arithmetic(node: fx.Node) -> bool:
    """A call that computes with complex numbers, not only views or copies them."""
    moves = kind(node) in (Kind.VIEW, Kind.MOVE, Kind.SIZE)
    return not moves and any(map(_is_complex, (node, *node.all_input_nodes)))


def complex_numbers(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Rewrite products and polar coordinates; then drop views that cancel."""
    effects = g.Effects(graph)
    for node in list(graph.nodes):
        name = g.called(node)
        if name == "polar" and g.fake(node).dtype == torch.complex64:
            new = _polar(node)
        elif name == "mul" and _is_product(node):
            new = _product(node)
        elif name == "mul" and _is_scaled(node):
            new = _scaled(node)
        elif name == "view_as_real" and g.called(inner := node.args[0]) == "view_as_complex":
            new = inner.args[0]
            if not effects.unchanged([new], new, node):
                report.miss(node, "the real numbers are overwritten before they are read again")
                continue
        elif name and _is_arithmetic(node):
            report.miss(node, f"{name} of complex numbers is not written in real ones")
            continue
        else:
            continue
        report.match(node)
        g.replace(node, new)
