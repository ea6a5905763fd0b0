"""Dead code and common subexpressions.

Cases:

1. a call without users that neither writes to a tensor nor draws random numbers is deleted
2. two equal calls of a function without side effects, on the same operands, with no write to an
   operand in between, become one (Hugging Face rebuilds the same mask and ``unsqueeze`` per layer)

Anything not known to be pure stays: in-place methods, random functions, context managers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport
from llm42c.passes.traits import is_random

# Modules whose functions have no effect besides their result (in-place and random ones are excluded by name).
_PURE_MODULES = (
    "_operator",
    "torch",
    "torch.functional",
    "torch.nn.functional",
    "torch._C._nn",
    "torch._C._linalg",
    "math",
)


def is_pure(node: fx.Node) -> bool:
    """Deleting or sharing the call cannot be noticed."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or g.mutated_arguments(node):
        return False
    if node.op == "call_method":
        target = str(node.target)
        return not target.endswith("_") and not is_random(target) and target != "item"
    if isinstance(node.target, torch._ops.OpOverload):
        return g.ours(node) is not None
    if not isinstance(g.value(node), (torch.Tensor, list, tuple, int, float, torch.SymInt, torch.SymFloat)):
        return False
    called = getattr(node.target, "__name__", "_")
    module = getattr(node.target, "__module__", None) or "torch"
    random = g.bind(node)["dropout_p"] != 0.0 if g.name(node) == "sdpa" else is_random(called)
    return module in _PURE_MODULES and not called.startswith("_") and not random


def erase_dead_code(graph: fx.Graph) -> int:
    """Case 1; returns how many calls went."""
    erased = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node):
            graph.erase_node(node)
            erased += 1
    return erased


def dead_code(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Case 1 as a pass."""
    for node in graph.nodes:
        if node.users or node.op not in ("call_function", "call_method"):
            continue
        if is_pure(node):
            report.match(node)
        else:
            report.miss(node, "nobody reads its result, but the call may have another effect")
    erase_dead_code(graph)


def _key(node: fx.Node) -> Any:
    def freeze(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return (type(arg).__name__, tuple(freeze(a) for a in arg))
        if isinstance(arg, dict):
            return tuple(sorted((k, freeze(v)) for k, v in arg.items()))
        if isinstance(arg, slice):
            return ("slice", freeze(arg.start), freeze(arg.stop), freeze(arg.step))
        return (type(arg).__name__, arg)  # 1, 1.0 and True are equal but not the same argument

    key = (node.op, node.target, freeze(node.args), freeze(node.kwargs))
    hash(key)
    return key


def _shareable(node: fx.Node) -> bool:
    """Pure, and equal calls give equal results: uninitialised memory does not."""
    is_call = node.op in ("call_function", "call_method")
    return is_call and is_pure(node) and "empty" not in str(getattr(node.target, "__name__", node.target))


def common_subexpressions(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Case 2. A graph that writes to tensors anywhere but in an operator of ours is left alone."""
    if writes := [n for n in graph.nodes if g.mutated_arguments(n) and not g.ours(n)]:
        report.miss(writes[0], "in a graph that writes to tensors no call is shared")
        return
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if not _shareable(node):
            continue
        try:
            first = seen.setdefault(_key(node), node)
        except TypeError:
            continue
        if first is node:
            continue
        if _both_returned(first, node):
            report.miss(node, "equal to an earlier call, but the graph returns both")
        else:
            report.match(node)
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _both_returned(a: fx.Node, b: fx.Node) -> bool:
    """Sharing would hand the caller one tensor twice, and a write to one would show in the other."""
    return all(any(user.op == "output" for user in node.users) for node in (a, b))
