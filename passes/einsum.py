"""``einsum`` becomes a product of matrices, which later passes know (plain).

Cases (letters of two operands):

1. letters of both and of the result are batch dimensions, letters of both and not of the result are summed,
   the others are rows of the first or columns of the second: a transposed ``matmul``. Several rows, columns
   or summed letters are folded to one dimension
2. nothing is summed: a product element by element

Not rewritten: other numbers of operands, ``...``, a letter twice in an operand, a letter of one operand that
the result does not have.

Before and after (a: [B, C, L, H, N], b: [B, C, S, H, N])::

    y = einsum("bclhn,bcshn->bclsh", a, b)
                          ↓
    a = permute(a, [0, 1, 3, 2, 4])                # [B, C, H, L, N]
    b = permute(b, [0, 1, 3, 4, 2])                # [B, C, H, N, S]
    y = permute(matmul(a, b), [0, 1, 3, 4, 2])     # [B, C, L, S, H]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport


@dataclass(frozen=True)
class _Letters:
    """The letters of an equation of two operands, each group in the order of the result or first operand."""

    a: str
    b: str
    out: str

    @property
    def batch(self) -> str:
        return "".join(c for c in self.out if c in self.a and c in self.b)

    @property
    def summed(self) -> str:
        return "".join(c for c in self.a if c in self.b and c not in self.out)

    @property
    def rows(self) -> str:
        return "".join(c for c in self.out if c in self.a and c not in self.b)

    @property
    def columns(self) -> str:
        return "".join(c for c in self.out if c in self.b and c not in self.a)


def _letters(equation: Any, operands: list[Any]) -> _Letters | str:
    """What the equation says, or why it is left alone."""
    if not isinstance(equation, str) or len(operands) != 2:
        return "not an equation of two operands"
    text = equation.replace(" ", "")
    if "->" not in text or "." in text:
        return f"the equation {equation}"
    (a, b), out = text.split("->")[0].split(","), text.split("->")[1]
    if any(len(set(part)) != len(part) for part in (a, b, out)):
        return f"a letter twice in {equation}"
    if any(c not in out and not (c in a and c in b) for c in a + b):
        return f"a sum over one operand in {equation}"
    return _Letters(a, b, out)


def _permuted(before: fx.Node, operand: fx.Node, has: str, wanted: str) -> fx.Node:
    if has == wanted:
        return operand
    return g.insert(before, g.FUNCTIONS["permute"], (operand, tuple(has.index(c) for c in wanted)))


def _folded(before: fx.Node, operand: fx.Node, first: int, count: int) -> fx.Node:
    """``count`` dimensions from ``first`` on as one."""
    if count == 0:
        return g.insert(before, g.FUNCTIONS["unsqueeze"], (operand, first))
    if count == 1:
        return operand
    return g.insert(before, g.FUNCTIONS["flatten"], (operand, first, first + count - 1))


def _unfolded(before: fx.Node, y: fx.Node, dim: int, sizes: list[Any]) -> fx.Node:
    if not sizes:
        return g.insert(before, g.FUNCTIONS["squeeze"], (y, dim))
    return y if len(sizes) == 1 else g.insert(before, g.FUNCTIONS["unflatten"], (y, dim, tuple(sizes)))


def _elementwise(node: fx.Node, at: _Letters, a: fx.Node, b: fx.Node) -> fx.Node:
    """Case 2."""
    a = _permuted(node, a, at.a, at.batch + at.rows)
    b = _permuted(node, b, at.b, at.batch + at.columns)
    for _ in at.columns:
        a = g.insert(node, g.FUNCTIONS["unsqueeze"], (a, len(at.batch + at.rows)))
    for _ in at.rows:
        b = g.insert(node, g.FUNCTIONS["unsqueeze"], (b, len(at.batch)))
    y = g.insert(node, g.FUNCTIONS["mul"], (a, b))
    return _permuted(node, y, at.batch + at.rows + at.columns, at.out)


def _product(node: fx.Node, at: _Letters, a: fx.Node, b: fx.Node) -> fx.Node:
    """Case 1."""
    rows = [g.size(node, a, at.a.index(c)) for c in at.rows]
    columns = [g.size(node, b, at.b.index(c)) for c in at.columns]
    n = len(at.batch)
    a = _permuted(node, a, at.a, at.batch + at.rows + at.summed)
    b = _permuted(node, b, at.b, at.batch + at.summed + at.columns)
    a = _folded(node, _folded(node, a, n + len(at.rows), len(at.summed)), n, len(at.rows))
    b = _folded(node, _folded(node, b, n, len(at.summed)), n + 1, len(at.columns))
    y = g.insert(node, g.FUNCTIONS["matmul"], (a, b))  # [*batch, M, N]
    y = _unfolded(node, _unfolded(node, y, n + 1, columns), n, rows)
    return _permuted(node, y, at.batch + at.rows + at.columns, at.out)


def _einsum(node: fx.Node) -> fx.Node | str:
    equation, *rest = node.args
    operands: list[Any] = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    letters = _letters(equation, operands)
    if isinstance(letters, str):
        return letters
    a, b = operands
    if g.tensor(a) is None or g.tensor(b) is None or g.fake(a).dtype != g.fake(b).dtype:
        return "operands of several dtypes"
    return (_product if letters.summed else _elementwise)(node, letters, a, b)


def einsum(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every einsum that is a product of two operands."""
    for node in list(graph.nodes):
        name = g.called(node)
        if name != "einsum" or not isinstance(g.value(node), torch.Tensor):
            continue
        new = _einsum(node)
        if isinstance(new, str):
            report.miss(node, new)
            continue
        report.match(node)
        g.replace(node, new)
