"""The ordered list of rewrites. Read it top to bottom: this is what happens to a graph.

Passes of other packages are given to :func:`run`; each says in front of which pass of the list it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.add_rms_norm import add_rms_norm
from llm42c.passes.addends import addends
from llm42c.passes.allreduce_rmsnorm import allreduce_rmsnorm
from llm42c.passes.attention_eager import attention_eager
from llm42c.passes.attention_sdpa import attention_sdpa
from llm42c.passes.base import PACKED, PLAIN, STOCK, Context, Pass, PassReport, Report
from llm42c.passes.check import check
from llm42c.passes.cleanup import common_subexpressions, dead_code, erase_dead_code
from llm42c.passes.collectives import collectives
from llm42c.passes.complex_numbers import complex_numbers
from llm42c.passes.conv1d import conv1d
from llm42c.passes.einsum import einsum
from llm42c.passes.grouped_mm import grouped_mm
from llm42c.passes.index_add import index_add
from llm42c.passes.layer_norm import layer_norm
from llm42c.passes.layout import layout
from llm42c.passes.linear import linear
from llm42c.passes.linear_add import linear_add
from llm42c.passes.linear_q import linear_q
from llm42c.passes.linear_silu_mul import linear_silu_mul
from llm42c.passes.matmul import matmul
from llm42c.passes.merge_linears import merge_linears
from llm42c.passes.normalize import normalize
from llm42c.passes.position_table import position_table
from llm42c.passes.reductions import reductions
from llm42c.passes.residual_shards import residual_shards
from llm42c.passes.rms_norm import rms_norm
from llm42c.passes.rotary import merge_rotary, rotary
from llm42c.passes.sizes import NO_SYMBOLS, SYMBOLS, baked, concretise
from llm42c.passes.solve_triangular import solve_triangular
from llm42c.passes.topk import topk
from llm42c.passes.two_chains import TWO_CHAINS
from llm42c.passes.varlen_attention import varlen_attention
from llm42c.passes.wanted_rows import wanted_rows

_PLAIN = frozenset({PLAIN})
_PACKED = frozenset({PACKED})
_ALL = frozenset({PLAIN, PACKED, STOCK})

PASSES: tuple[Pass, ...] = (
    # One spelling for one meaning.
    Pass("collectives", collectives),
    Pass("normalize", normalize, _ALL),
    Pass("dead_code", dead_code, _ALL),
    Pass("common_subexpressions", common_subexpressions, _ALL),
    Pass("complex_numbers", complex_numbers),
    Pass("addends", addends, _PLAIN),
    Pass("einsum", einsum, _PLAIN),
    Pass("conv1d", conv1d, _PLAIN),
    # Attention, whose products and softmax are nobody else's.
    Pass("attention_sdpa", attention_sdpa, _PLAIN),
    Pass("attention_eager", attention_eager, _PLAIN),
    Pass("varlen_attention", varlen_attention),
    Pass("position_table", position_table, _PACKED),
    # Norms, and what they take along.
    Pass("layer_norm", layer_norm),
    Pass("rms_norm", rms_norm),
    Pass("add_rms_norm", add_rms_norm),
    Pass("allreduce_rmsnorm", allreduce_rmsnorm),
    Pass("residual_shards", residual_shards),
    # Products with a weight.
    Pass("linear_q", linear_q, _PACKED),
    Pass("linear_silu_mul", linear_silu_mul),
    Pass("merge_linears", merge_linears, _PACKED),
    Pass("linear", linear),
    Pass("grouped_mm", grouped_mm, _PLAIN),
    # Every other call whose order could be seen.
    Pass("index_add", index_add),
    Pass("topk", topk),
    Pass("solve_triangular", solve_triangular, _PLAIN),
    Pass("matmul", matmul),
    Pass("reductions", reductions),
    # Fewer calls, the same bits.
    Pass("linear_add", linear_add, _PACKED),
    Pass("wanted_rows", wanted_rows, _PACKED),
    Pass("rotary", rotary, _PACKED),
    Pass("layout", layout, _PACKED),
    Pass("common_subexpressions", common_subexpressions, _PACKED),
    Pass("merge_rotary", merge_rotary, _PACKED),
    Pass("layout", layout, _PACKED),
    # What has no known order is named.
    Pass("check", check),
)

ON_REQUEST: tuple[Pass, ...] = (TWO_CHAINS,)  # run for those who name them

Observer = Callable[[str, fx.Graph], None]


def passes_for(target: str, added: Sequence[Pass] = ()) -> list[Pass]:
    """The passes that run on that kind of graph, in order; each of ``added`` in front of what it names.

    Several in front of one pass keep their order. Raises ValueError where one names no pass of the list.
    """
    steps, waiting = [], list(added)
    for step in PASSES:
        steps += [p for p in waiting if p.before == step.name]
        waiting = [p for p in waiting if p.before != step.name]
        steps.append(step)
    if waiting:
        raise ValueError(f"the pass {waiting[0].name} stands before {waiting[0].before}, which is no pass")
    return [p for p in steps if target in p.targets]


def run(
    gm: fx.GraphModule, ctx: Context, observe: Observer | None = None, added: Sequence[Pass] = ()
) -> Report:
    """Run the pipeline on ``gm`` in place, with passes ``added`` by others.

    ``observe(name, graph)`` is called with ``"00_input"`` before the first pass and with
    ``"NN_<pass>"`` after each pass that changed something. What an added pass leaves is looked at before
    anybody else reads it; IllegalRewriteError says what is wrong with it.
    """
    report = Report()
    graph = gm.graph
    if ctx.target != PLAIN and (why := concretise(gm)) not in (None, NO_SYMBOLS):
        report.notes.append(f"sizes stay symbolic: {why}")
    if observe is not None:
        observe("00_input", graph)
    for number, step in enumerate(passes_for(ctx.target, added), start=1):
        entry = PassReport(step.name, nodes_before=len(graph.nodes))
        start = time.perf_counter()
        if step in added:
            _guarded(step, graph, ctx, entry)
        else:
            step.apply(graph, ctx, entry)
        erase_dead_code(graph)
        entry.seconds = time.perf_counter() - start
        entry.nodes_after = len(graph.nodes)
        report.passes.append(entry)
        if observe is not None and (entry.matches or entry.nodes_after != entry.nodes_before):
            observe(f"{number:02d}_{step.name}", graph)
    report.unplaced = report["check"].misses
    if SYMBOLS in gm.meta and (faults := baked(graph)):
        raise g.IllegalRewriteError(f"a size was written into {faults[0].format_node()}")
    graph.lint()
    gm.recompile()
    return report


def _guarded(step: Pass, graph: fx.Graph, ctx: Context, entry: PassReport) -> None:
    """An added pass: its errors and faults bear its name."""
    entry.added = step.origin
    before = set(graph.nodes)
    try:
        step.apply(graph, ctx, entry)
        graph.lint()
    except Exception as error:
        error.add_note(f"in the pass {step.name} of {step.function()[0].__module__}")
        raise
    for node in graph.nodes:
        if node not in before and node.op.startswith("call") and g.value(node) is None:
            raise g.IllegalRewriteError(
                f"the pass {step.name} made {node.format_node()} without a value; use graph.insert"
            )
