"""What moves between ranks, as two nodes: a call that starts it and a call that waits for it.

``_c10d_functional`` operators come that way. An operator that communicates and returns when it is done is
written as ``wait(start(operator, *args))``; executed as they stand the two are the operator itself. A runner
gives them other meanings (another stream, another thread).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from llm42c.codegen.operator import Traffic
from llm42c.passes import graph as g

_ALL_REDUCE = "_c10d_functional::all_reduce"
_FUNCTIONAL = frozenset({_ALL_REDUCE, "_c10d_functional::all_gather_into_tensor"})
_WAIT = "_c10d_functional::wait_tensor"


def start(operator: Callable[..., Any], *args: Any) -> Any:
    """Begin ``operator(*args)``."""
    return operator(*args)


def wait(begun: Any) -> Any:
    """The result of what :func:`start` began."""
    return begun


def is_collective(node: fx.Node) -> bool:
    """A call that moves data between ranks, in either form, before it is written as two."""
    return g.called(node) in _FUNCTIONAL or returns_when_done(node)


def returns_when_done(node: fx.Node) -> bool:
    """A collective that is one call."""
    ours = g.ours(node)
    return ours is not None and ours.traffic is not None


def is_sum(node: fx.Node) -> bool:
    """A collective that adds what the ranks hold."""
    ours = g.ours(node)
    return ours.traffic is Traffic.SUM if ours else g.called(node) == _ALL_REDUCE


def is_start(node: fx.Node) -> bool:
    return node.target is start or g.called(node) in _FUNCTIONAL


def is_wait(node: fx.Node) -> bool:
    return node.target is wait or g.called(node) == _WAIT


def collective_name(node: fx.Node) -> str:
    """The operator that a start node begins, e.g. ``llm42::all_reduce``."""
    if node.target is start:
        operator: Any = node.args[0]
        return str(operator.name()).removesuffix(".default")
    return g.called(node)


def message(node: fx.Node) -> fx.Node:
    """The tensor that a start node sends."""
    sent = node.args[1] if node.target is start else node.args[0]
    if not isinstance(sent, fx.Node):
        raise TypeError(f"{node.format_node()} sends no tensor")
    return sent


def group_name(node: fx.Node) -> str:
    """The process group of a start node."""
    return str(node.args[-1])


def starts(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and is_start(n)]


def bytes_per_row(node: fx.Node, rows: int) -> float:
    """Bytes of a start node's message for one of its ``rows`` tokens."""
    t = g.fake(message(node))
    return float(t.numel() * t.element_size()) / rows
