"""What kind of computation a node is, as far as the order of its arithmetic is concerned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from llm42c.passes import graph as g
from llm42c.passes.traits import Kind, functional, traits_of

__all__ = ["FOREIGN", "UNPLACED", "Kind", "kind"]


UNPLACED = (Kind.TIES, Kind.REDUCTION, Kind.UNKNOWN)
# Neither ours nor exact: the bits hang on who computes.
FOREIGN = frozenset({Kind.TRANSCENDENTAL, *UNPLACED})


def _has_tensor_index(node: fx.Node) -> bool:
    index = node.args[1] if len(node.args) > 1 else None
    parts: Any = index if isinstance(index, (tuple, list)) else (index,)
    return any(isinstance(p, (list, Tensor)) or g.tensor(p) is not None for p in parts)


def _integral(node: fx.Node) -> bool:
    """Every tensor that goes in and comes out is of integers or booleans."""
    values = [g.tensor(n) for n in (node, *node.all_input_nodes)]
    return all(not t.is_floating_point() and not t.is_complex() for t in values if t is not None)


def _accumulates(node: fx.Node, name: str) -> Kind | None:
    """Of a call that writes elements to places: whether it adds them to what is there, or to each other."""
    base = functional(name)
    if base in ("index_put", "put"):
        flag = node.kwargs.get("accumulate", g.arg(node, 3))
        return Kind.MOVE if flag in (None, False) else Kind.REDUCTION
    if base in ("scatter", "scatter_reduce", "index_reduce"):
        how = node.kwargs.get("reduce", g.arg(node, 4))
        if how in ("amax", "amin"):
            return Kind.EXACT_REDUCTION
        return Kind.REDUCTION if how is not None or base != "scatter" else None
    if base == "embedding" and (g.arg(node, 3) or node.kwargs.get("max_norm")) is not None:
        return Kind.REDUCTION  # it scales rows by their norm first
    return None


def _row_decides(node: fx.Node) -> bool:
    """A top-k on a CPU: which of equals it takes is a function of the row (``tests/passes/test_topk.py``)."""
    x = g.tensor(g.arg(node))
    return g.called(node) == "topk" and x is not None and x.device.type == "cpu"


def _stable(node: fx.Node) -> bool:
    """A sort that keeps equals in their order."""
    return node.kwargs.get("stable") is True


def _values_only(node: fx.Node) -> bool:
    """Nobody reads which elements were taken."""
    if isinstance(g.value(node), Tensor):
        return g.called(node) in ("median", "nanmedian")
    taken = [user.args[1] if len(user.args) > 1 else None for user in node.users]
    is_access = all(g.name(user) == "getitem" or user.target is getattr for user in node.users)
    return is_access and all(part in (0, "values") for part in taken)


def _redistribution(node: fx.Node) -> Kind:
    """Of a DTensor: moves its parts, unless they are summands.

    A looked-up row of a divided embedding is one rank's row plus the others' zeros: an exact sum.
    """
    placements = getattr(g.value(node.args[0]), "placements", None)
    if placements is None:
        return Kind.UNKNOWN
    return Kind.REDUCTION if any(type(p).__name__ == "Partial" for p in placements) else Kind.MOVE


def kind(node: fx.Node) -> Kind:
    """The kind of a call node."""
    if g.ours(node) is not None:
        return Kind.OPERATOR
    value = g.value(node)
    tensors = [n for n in node.all_input_nodes if g.tensor(n) is not None]
    if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size)):
        return Kind.SIZE
    if isinstance(value, tuple) and value and all(isinstance(v, (int, torch.SymInt)) for v in value):
        return Kind.SIZE  # strides
    name = g.called(node)
    if name == "getitem":
        return Kind.MOVE if _has_tensor_index(node) else Kind.VIEW
    if name == "getattr":
        return Kind.VIEW if isinstance(value, Tensor) else Kind.SIZE
    if name == "redistribute":
        return _redistribution(node)
    found = _accumulates(node, name) or traits_of(name).kind
    if found not in (Kind.VIEW, Kind.MOVE) and isinstance(value, Tensor) and value.is_complex():
        return Kind.UNKNOWN  # libraries round complex numbers alone and in vectors differently
    if found is Kind.TIES:
        settled = _row_decides(node) or _stable(node) or _values_only(node)
        return Kind.EXACT_REDUCTION if settled else Kind.TIES
    if found is Kind.TRANSCENDENTAL and name == "pow" and _integral(node):
        return Kind.EXACT
    if found is Kind.REDUCTION and tensors and _integral(node):
        return Kind.EXACT_REDUCTION
    if found is not Kind.UNKNOWN:
        return found
    if not tensors and (name.startswith("_") or value is None):
        return Kind.SIZE  # context managers, logging, what neither reads nor gives a tensor
    return Kind.UNKNOWN
