"""Products of rows that are sorted by expert become ``llm42::grouped_linear`` (plain).

Hugging Face multiplies the rows of a mixture's experts group by group; a library picks the kernel, and with
it the order of summation, by the number of rows that share an expert.

Cases (S = T·K rows, x: [S, K], w: [E, K, N] at any strides, ``offsets``: [E], where each expert's rows end):

1. ``F.grouped_mm(x, w, offs=offsets)``, ``torch._grouped_mm``
2. ``transformers::grouped_mm_fallback(x, w, offsets)``, which stands for it where dtypes are not bf16
3. the offsets count sorted keys, ``cumsum(histc(keys, E, 0, E - 1), 0)`` with ``keys, _ = sort(experts)``:
   the keys are what the operator asks for, and the counting goes
4. other offsets: row i belongs to the first group that ends behind i. Rows behind the last end are computed
   with the last expert (a library leaves them undefined)

Not rewritten: products of other ranks (2-D by 2-D sums over rows), a bias or another dtype of the result
within the call, fp64.

Before and after::

    keys, perm = torch.sort(experts)                            # [S]
    counts  = torch.histc(keys.float(), E, 0, E - 1)
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)    →
    y = F.grouped_mm(x[perm // K], w, offs=offsets)             y = llm42.grouped_linear(
                                                                    x[perm // K], w, None, keys, True)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport, usable

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = frozenset({"grouped_mm", "_grouped_mm"})
_FALLBACK = "transformers::grouped_mm_fallback"
_ARGUMENTS = ("input", "weight", "offs", "bias", "out_dtype")


def _bound(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a grouped product by name, or None."""
    called = g.called(node)
    if called not in _NAMES and called != _FALLBACK:
        return None
    renamed = {"mat_a": "input", "mat_b": "weight", "self": "input", "mat2": "weight"}
    bound = dict.fromkeys(_ARGUMENTS) | dict(zip(_ARGUMENTS, node.args, strict=False))
    return bound | {renamed.get(key, key): arg for key, arg in node.kwargs.items()}


def _refusal(node: fx.Node, bound: dict[str, Any], ctx: Context) -> str | None:
    x, w, offs = (g.tensor(bound[key]) for key in ("input", "weight", "offs"))
    if x is None or w is None or offs is None or x.dim() != 2 or w.dim() != 3 or offs.dim() != 1:
        return "not a product of rows with the matrices of their groups"
    if bound["bias"] is not None or not x.dtype == w.dtype == g.fake(node).dtype:
        return "a grouped product with a bias or of several dtypes"
    if x.dtype not in _FLOATS:
        return f"dtype {x.dtype}"
    return usable(ctx, "grouped_linear")


def _through(node: Any, kind: str) -> Any:
    """What ``node`` is made of, behind calls of ``kind``."""
    while g.name(node) == kind:
        node = node.args[0]
    return node


def _sorted_keys(offsets: fx.Node, groups: Any) -> fx.Node | None:
    """Case 3: the keys that the offsets count."""
    total = _through(offsets, "to")
    if g.name(total) != "cumsum" or not isinstance(counts := total.args[0], fx.Node):
        return None
    if g.called(counts) != "histc":
        return None
    given = {**dict(zip(("input", "bins", "min", "max"), counts.args, strict=False)), **counts.kwargs}
    limits = (given.get("bins"), given.get("min"), given.get("max"))
    if not isinstance(groups, int) or limits != (groups, 0, groups - 1):
        return None
    keys = _through(given["input"], "to")
    is_first = g.name(keys) == "getitem" and g.arg(keys, 1) == 0
    made_by = g.called(keys.args[0]) if is_first else ""
    return keys if made_by == "sort" and g.fake(keys).dtype == torch.int64 else None


def _group(node: fx.Node, bound: dict[str, Any]) -> fx.Node:
    """The group of every row: int64 [S]."""
    groups = g.fake(bound["weight"]).shape[0]
    keys = _sorted_keys(bound["offs"], groups)
    if keys is not None:
        return keys
    x, device = g.fake(bound["input"]), g.fake(node).device
    count = x.shape[0] if isinstance(x.shape[0], int) else g.insert(node, "size", (bound["input"], 0))
    rows = g.insert(node, torch.arange, (count,), {"device": device, "dtype": g.fake(bound["offs"]).dtype})
    group = g.insert(node, torch.searchsorted, (bound["offs"], rows), {"right": True})
    last = groups - 1 if isinstance(groups, int) else g.insert(node, "size", (bound["weight"], 0))
    return g.insert(node, g.FUNCTIONS["clamp"], (group,), {"max": last})


def grouped_mm(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Replace every grouped product."""
    for node in list(graph.nodes):
        if node.op != "call_function" or (bound := _bound(node)) is None:
            continue
        reason = _refusal(node, bound, ctx)
        if reason is not None:
            report.miss(node, reason)
            continue
        args = (bound["input"], bound["weight"], None, _group(node, bound), True)
        report.match(node)
        g.replace(node, g.insert(node, torch.ops.llm42.grouped_linear.default, args))
