"""All-reduce, residual addition and pre-norm become one operator.

Runs after ``collectives`` and ``add_rms_norm``, so a site is an ``llm42.all_reduce`` whose sum ends as an
operand of ``llm42.add_rms_norm``, followed through views, copies and a cast, as either operand.

Cases:

1. all-reduce → residual addition → RMSNorm (Llama, Qwen 2 and 3, Mistral, Phi-3, Mixtral, Qwen 3 MoE); the
   residual stream may have any number of other readers
2. the same with a cast between sum and addition: the operator rounds where the graph does

Left as they are, each with its reason in the report:

3. norm, then addition (Gemma 2 and 3, OLMo 2): the norm needs the sum alone
4. a scaled sum (Granite), a bias added first, a LayerNorm after the addition (Cohere)
5. a sum that is read elsewhere too

Before and after (x: this rank's partial sum, all [B, S, H])::

    s    = llm42.all_reduce(x, g)
    y, h = llm42.add_rms_norm(s, r, w, eps, 0.0, True)   →   y, h = llm42.all_reduce_add_rms_norm(
                                                                 x, r, w, eps, 0.0, True, g)
"""

from __future__ import annotations

import itertools

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport, usable
from llm42c.passes.kinds import Kind, kind

_COPIES = ("to", "clone", "contiguous")


def _is_whole(step: fx.Node) -> bool:
    """``step`` is a view, copy or cast of all of its first argument, same rows in the same order."""
    before, after = g.tensor(g.arg(step)), g.tensor(step)
    if before is None or after is None or not (kind(step) is Kind.VIEW or g.name(step) in _COPIES):
        return False
    if not g.same(before.shape[-1], after.shape[-1]) or not g.same(before.numel(), after.numel()):
        return False
    return g.is_contiguous(before) and g.is_contiguous(after)


def _follow(start: fx.Node) -> list[fx.Node]:
    """The views, copies and casts that the sum goes through, one after the other."""
    steps: list[fx.Node] = []
    node: fx.Node | None = g.only_user(start)
    while node is not None and _is_whole(node):
        steps.append(node)
        node = g.only_user(node)
    return steps


def _added_first(add: fx.Node) -> str:
    """Why an addition that reads the sum is not the one of the pattern."""
    shapes = [t.dim() for a in add.args if (t := g.tensor(a)) is not None]
    if len(shapes) == 2 and min(shapes) == 1:
        return "a bias is added to the sum first"
    if any(g.name(u) == "llm42::layer_norm" or g.name(u) == "layer_norm" for u in add.users):
        return "a LayerNorm follows the residual addition"
    return "no RMSNorm follows the residual addition"


def _why_not(end: fx.Node) -> str:
    """What stands where the addition and the norm should be."""
    if len(end.users) != 1:
        return "the sum is read in several places" if end.users else "nobody reads the sum"
    user = next(iter(end.users))
    called = g.name(user)
    if called == "llm42::rms_norm":
        return "the sum is normed before the residual is added"
    if called == "mul":
        return "the sum is scaled before the residual is added"
    if called == "add":
        return _added_first(user)
    if called == "llm42::all_reduce_add_rms_norm":
        return "the other operand is a sum over ranks too, and was taken"
    return f"the sum goes into {called or user.target}"


def _cast_refusal(total: fx.Node, steps: list[fx.Node], residual: fx.Node) -> str | None:
    dtypes = [g.fake(n).dtype for n in (total, *steps)]
    changes = sum(a != b for a, b in itertools.pairwise(dtypes))
    if changes > 1:
        return "the sum is cast more than once"
    if dtypes[-1] != g.fake(residual).dtype:
        return "the addition promotes"
    return None


def _replayed(steps: list[fx.Node], x: fx.Node, before: fx.Node) -> fx.Node:
    """The views of ``steps`` applied to ``x`` instead; copies and casts are the operator's."""
    for step in steps:
        if g.name(step) not in _COPIES:
            x = g.insert(before, step.target, (x, *step.args[1:]), dict(step.kwargs), like=step)
    return x


def allreduce_rmsnorm(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Fuse every site of cases 1 and 2."""
    effects = g.Effects(graph)
    for node in list(graph.nodes):
        if node.target is not torch.ops.llm42.all_reduce.default:
            continue
        if (reason := usable(ctx, "all_reduce_add_rms_norm")) is not None:
            report.miss(node, reason)
            continue
        steps = _follow(node)
        end = steps[-1] if steps else node
        norm = g.only_user(end)
        if (
            norm is None
            or norm.target is not torch.ops.llm42.add_rms_norm.default
            or end not in norm.args[:2]
        ):
            report.miss(node, _why_not(end))
            continue
        residual = norm.args[1] if norm.args[0] is end else norm.args[0]
        x, group = node.args
        reason = _cast_refusal(node, steps, residual)  # type: ignore[arg-type]
        if reason is None and not effects.unchanged(node.all_input_nodes, node, norm):
            reason = "the partial sum is written to in between"
        if reason is not None:
            report.miss(node, reason)
            continue
        x = _replayed(steps, x, norm)
        args = (x, residual, *norm.args[2:], group)
        fused = g.insert(norm, torch.ops.llm42.all_reduce_add_rms_norm.default, args, like=norm)
        report.match(node)
        g.replace(norm, fused)
