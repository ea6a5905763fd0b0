"""Among equal scores, the choice does not depend on the batch.

A router may give two experts one score. Which of them ``topk`` takes is nowhere said. On a GPU it depends on
the algorithm, which is chosen by the number of rows; a stable sort takes the lower index. On a CPU it is a
function of the row alone (``tests/passes/test_topk.py``), and stays what eager code takes.

Cases (x: [..., N]):

1. ``torch.topk(x, k, dim, largest, sorted)`` on a GPU: the first k of a stable sort; also where the order of
   the k was not asked for
2. ``torch.sort``, ``torch.argsort`` without ``stable``: with it

Before and after, on a GPU::

    values, indices = torch.topk(x, k)   →   s, i = torch.sort(x, dim=-1, descending=True, stable=True)
                                             values, indices = s.narrow(-1, 0, k), i.narrow(-1, 0, k)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport

_TOPK = (("input", None), ("k", None), ("dim", -1), ("largest", True), ("sorted", True))
_SORT = (("input", None), ("dim", -1), ("descending", False))


def _bound(node: fx.Node, signature: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    bound = dict(signature)
    for (key, _), arg in zip(signature, node.args, strict=False):
        bound[key] = arg
    return bound | node.kwargs


def _row_decides(device: torch.device) -> bool:
    """The library's choice among equals is a function of the row."""
    return device.type == "cpu"


def _part(user: fx.Node) -> int | None:
    """Which of (values, indices) a user of a top-k takes."""
    if g.name(user) == "getitem" and user.args[1] in (0, 1):
        return int(user.args[1])  # type: ignore[arg-type]
    if user.target is getattr and user.args[1] in ("values", "indices"):
        return 0 if user.args[1] == "values" else 1
    return None


def _refusal(node: fx.Node) -> str | None:
    x = g.tensor(node.args[0]) if node.args else None
    if x is None or x.dim() == 0:
        return "not the elements of a tensor"
    if any(_part(user) is None for user in node.users):
        return "values and indices are used as one"
    return None


def _first_of_sorted(node: fx.Node) -> None:
    bound = _bound(node, _TOPK)
    keywords = {"dim": bound["dim"], "descending": bound["largest"], "stable": True}
    whole = g.insert(node, torch.sort, (bound["input"],), keywords)
    for user in g.users(node):
        part = g.insert(node, operator.getitem, (whole, _part(user)))
        part = g.insert(node, g.FUNCTIONS["narrow"], (part, bound["dim"], 0, bound["k"]))
        g.replace(user, g.insert(node, "contiguous", (part,)))  # as topk's own result: it may be viewed
    node.graph.erase_node(node)


def _stable(node: fx.Node) -> bool:
    """Case 2; whether the call changed."""
    bound = _bound(node, _SORT)
    if bound.get("stable") or "out" in bound:
        return False
    node.args = (bound.pop("input"),)
    node.kwargs = {"dim": bound["dim"], "descending": bound["descending"], "stable": True}
    return True


def topk(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Give every top-k and every sort one order among equals."""
    for node in list(graph.nodes):
        name = g.called(node)
        x = g.tensor(g.arg(node))
        if name == "topk" and x is not None and not _row_decides(x.device):
            reason = _refusal(node)
            if reason is not None:
                report.miss(node, reason)
                continue
            report.match(node)
            _first_of_sorted(node)
        elif name in ("sort", "argsort") and x is not None and _stable(node):
            report.match(node)
