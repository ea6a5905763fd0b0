"""The residual stream stays divided among the ranks from one fused norm to the next.

Runs after ``allreduce_rmsnorm``, where ``Context.residual_shards`` asks for it. Between two fused norms
nobody but the second reads the residual stream, so each rank may keep its own rows and add and norm only
those; see ``codegen/ops/all_reduce_add_rms_norm.py``.

Cases:

1. a chain of two or more fused norms, each one's sum read as the next one's residual and nowhere else
2. the last sum of a chain is read elsewhere: it is gathered there

Before and after (all [B, S, H]; shards: [ceil(B S / n), H])::

    y0, h0 = all_reduce_add_rms_norm(x0, r, …)      s      = shard_rows(r, n, g)
    y1, h1 = all_reduce_add_rms_norm(x1, h0, …)  →  y0, s0 = all_reduce_add_rms_norm_sharded(x0, s, …)
    use(h1)                                         y1, s1 = all_reduce_add_rms_norm_sharded(x1, s0, …)
                                                    use(gather_rows(s1, y1, n, g))

In small batches this is a loss where one gathering of all partial sums would do (``codegen/dist``): it is
for long prefills.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from llm42c.codegen.dist.collectives import group_of
from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport

_RESIDUAL = 1


def _is_fused(node: fx.Node | None) -> bool:
    return node is not None and node.target is torch.ops.llm42.all_reduce_add_rms_norm.default


def _output(fused: fx.Node, index: int) -> fx.Node | None:
    """The access to one of the two results, None where nobody reads it."""
    return next((u for u in fused.users if g.name(u) == "getitem" and u.args[1] == index), None)


def _next(fused: fx.Node) -> fx.Node | None:
    """The fused norm that alone reads this one's sum, as its residual and of the same group."""
    total = _output(fused, 1)
    user = g.only_user(total) if total is not None else None
    if user is None or not _is_fused(user):
        return None
    alone = user.args[_RESIDUAL] is total and user.args.count(total) == 1
    return user if alone and user.args[-1] == fused.args[-1] else None


def _shard(chain: list[fx.Node], size: int) -> None:
    first, group = chain[0], chain[0].args[-1]
    shard = g.insert(first, torch.ops.llm42.shard_rows.default, (first.args[_RESIDUAL], size, group))
    for fused in chain:
        x, _, *norm, _ = fused.args
        target = torch.ops.llm42.all_reduce_add_rms_norm_sharded.default
        both = g.insert(fused, target, (x, shard, *norm, size, group), like=fused)
        normed = g.insert(fused, operator.getitem, (both, 0), like=fused)
        shard = g.insert(fused, operator.getitem, (both, 1), like=fused)
        old_normed, old_total = _output(fused, 0), _output(fused, 1)
        if old_total is not None and fused is chain[-1]:
            whole = g.insert(old_total, torch.ops.llm42.gather_rows.default, (shard, normed, size, group))
            g.replace(old_total, whole)
        if old_normed is not None:
            g.replace(old_normed, normed)


def residual_shards(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Divide the residual of every chain."""
    if not ctx.residual_shards:
        return
    fused = [n for n in graph.nodes if _is_fused(n)]
    followers = {n: _next(n) for n in fused}
    starts = [n for n in fused if n not in followers.values()]
    for start in starts:
        chain = [start]
        while (following := followers[chain[-1]]) is not None:
            chain.append(following)
        if len(chain) == 1:
            report.miss(start, "its sum is not the residual of another fused norm alone")
            continue
        for node in chain:
            report.match(node)
        group = chain[0].args[-1]
        _shard(chain, group_of(str(group)).size())
        for node in reversed(chain):
            for access in list(node.users):
                if not access.users:
                    graph.erase_node(access)
            graph.erase_node(node)
