"""Values that a packed graph computes from the number of its tokens alone, and what they are.

A model may build its mask, its linear biases and its positions itself, for one sequence that begins at 0.
In a packed batch a token's place among all tokens says nothing, so none of these may stay as they are. They
depend on no data, which is why they can be evaluated for as many tokens as the model has positions: what they
are is then seen, and not guessed from how they are spelled.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from llm42c.passes import graph as g

_SHAPE_ONLY = frozenset(
    {"ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full", "new_empty"}
)


@dataclass
class TokenFunctions:
    """Which nodes depend on the number of tokens T, on constants and on ``positions`` alone.

    Calls that read a tensor for its shape and dtype only (``ones_like``) do not depend on what it holds.
    """

    graph: fx.Graph
    tokens: Any  # the SymInt of T
    positions: fx.Node | None  # [1, T]
    _closed: dict[fx.Node, bool] = field(default_factory=dict)

    def closed(self, node: Any) -> bool:
        """The value of ``node`` can be evaluated for any number of tokens."""
        if not isinstance(node, fx.Node):
            return True
        if node not in self._closed:
            self._closed[node] = self._is_closed(node)
        return self._closed[node]

    def _is_closed(self, node: fx.Node) -> bool:
        value = g.value(node)
        if isinstance(value, (int, float, bool, torch.SymInt)):
            return not isinstance(value, torch.SymInt) or self._size(value, 3) is not None
        if node.op == "get_attr" or node is self.positions:
            return True
        if node.op not in ("call_function", "call_method") or g.mutated_arguments(node):
            return False
        sources = node.all_input_nodes
        if g.called(node) in _SHAPE_ONLY and isinstance(node.args[0], fx.Node):
            sources = [n for n in sources if n is not node.args[0]]
            shape = g.fake(node.args[0]).shape
            if any(isinstance(s, torch.SymInt) and self._size(s, 3) is None for s in shape):
                return False
        return all(self.closed(source) for source in sources)

    def _size(self, value: torch.SymInt, tokens: int) -> int | None:
        """A size with ``tokens`` put in for T, or None if it depends on another symbol."""
        symbol = self.tokens.node.expr
        found = value.node.expr.subs(symbol, tokens)
        return int(found) if found.is_number else None

    def _known(self, size: Any, tokens: int) -> int:
        found = self._size(size, tokens) if isinstance(size, torch.SymInt) else size
        return int(found)  # type: ignore[arg-type]

    def evaluate(self, node: Any, tokens: int) -> Any:
        """The value of a closed node for one sequence of ``tokens`` tokens at positions 0, 1, …"""
        done: dict[fx.Node, Any] = {}

        def of(n: fx.Node) -> Any:
            if n in done:
                return done[n]
            value = g.value(n)
            if isinstance(value, torch.SymInt):
                result: Any = self._size(value, tokens)
            elif isinstance(value, (int, float, bool)):
                result = value
            elif n is self.positions:
                result = torch.arange(tokens)[None]
            elif not self.closed(n):
                result = torch.zeros([self._known(s, tokens) for s in g.fake(n).shape], dtype=g.fake(n).dtype)
            elif n.op == "get_attr":
                result = operator.attrgetter(str(n.target))(n.graph.owning_module).detach()
            else:
                args, kwargs = fx.node.map_arg((n.args, n.kwargs), of)
                target: Any = n.target
                call = target if n.op == "call_function" else getattr(args[0], target)
                result = call(*(args if n.op == "call_function" else args[1:]), **kwargs)
            done[n] = result
            return result

        if not isinstance(node, fx.Node):
            return node
        with torch.no_grad():
            return of(node)


def _counted(values: TokenFunctions, node: fx.Node) -> int | None:
    """c of a value [..., T] that is ``arange(T) + c``, or None."""
    t = g.tensor(node)
    if t is None or t.is_floating_point() or t.dtype is torch.bool or t.dim() == 0:
        return None
    if not g.same(t.shape[-1], values.tokens) or not all(g.same(s, 1) for s in t.shape[:-1]):
        return None
    found: set[int] = set()
    for tokens in (5, 48):
        value = values.evaluate(node, tokens)
        offset = int(value.reshape(-1)[0])
        if not torch.equal(value.reshape(-1), torch.arange(tokens, dtype=value.dtype) + offset):
            return None
        found.add(offset)
    return found.pop() if len(found) == 1 else None


def recover_positions(values: TokenFunctions) -> int:
    """Counts of tokens, such as ``arange(T)`` or a sum of ones, become the positions; returns how many."""
    if values.positions is None:
        return 0
    recovered = 0
    among = TokenFunctions(values.graph, values.tokens, None)
    for node in list(values.graph.nodes):
        if node.op not in ("call_function", "call_method") or not among.closed(node):
            continue
        offset = _counted(among, node)
        if offset is None:
            continue
        first = node.next
        flat = g.insert(first, g.FUNCTIONS["reshape"], (values.positions, tuple(_shape(node))), like=node)
        if offset:
            flat = g.insert(first, g.FUNCTIONS["add"], (flat, offset), like=node)
        if g.fake(flat).dtype != g.fake(node).dtype:
            flat = g.insert(first, "to", (flat, g.fake(node).dtype), like=node)
        g.replace(node, flat)
        among._closed.clear()
        values._closed.clear()
        recovered += 1
    return recovered


def _shape(node: fx.Node) -> list[int]:
    return [1] * (g.fake(node).dim() - 1) + [-1]


def left_over(values: TokenFunctions) -> fx.Node | None:
    """A node whose rows depend on their place among the tokens, read by what is no function of T; or None."""
    among = TokenFunctions(values.graph, values.tokens, None)
    for node in values.graph.nodes:
        t = g.tensor(node)
        if t is None or node.op == "placeholder" or not among.closed(node):
            continue
        axes = [i for i, size in enumerate(t.shape) if g.same(size, values.tokens)]
        if not axes or all(among.closed(user) for user in node.users if user.op != "output"):
            continue
        value = among.evaluate(node, 48)
        if any(not _constant_along(value, axis) for axis in axes):
            return node
    return None


def _constant_along(value: Tensor, axis: int) -> bool:
    return torch.equal(value, value.narrow(axis, 0, 1).expand_as(value))
