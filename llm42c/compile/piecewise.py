"""Compile a packed graph in pieces: operators are called directly, clusters between them by Inductor.

Equal clusters are compiled once, so 30 layers cost as much as one; a graph in which every call was fused
into operators needs no Inductor at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from llm42c.compile import inductor
from llm42c.compile.clusters import Cluster, find_clusters, outline, structural_hash
from llm42c.compile.straightline import Step, emit
from llm42c.options import Reductions
from llm42c.passes import graph as g
from llm42c.passes.kinds import Kind, kind
from llm42c.passes.sizes import SYMBOLS, rebased, symbolic


@dataclass
class PiecewiseProgram:
    """A compiled packed graph. Call it with the graph's inputs in placeholder order.

    ``source`` is the Python text that runs; ``clusters`` counts how often each compiled kernel is called
    (by structural hash); ``operators`` counts calls of operators and of everything else.
    """

    run: Callable[..., tuple[Any, ...]]
    source: str
    clusters: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        # Nothing here is differentiated; without the autograd layers a call costs half as much.
        with torch._C._AutoDispatchBelowAutograd():
            return self.run(*inputs)


def compile_piecewise(gm: fx.GraphModule, reductions: Reductions = "fixed") -> PiecewiseProgram:
    """Compile ``gm`` after the packed pipeline, its packed weights materialised.

    ``reductions="free"`` gives the clusters to Inductor with its own settings.

    Inputs of the result are ``gm``'s placeholders, sizes included. Parameters, buffers and packed weights
    are bound when this is called. Shapes stay symbolic where the graph's are.
    """
    start = time.perf_counter()
    graph = gm.graph
    compile_module = inductor.compile_fixed if reductions == "fixed" else inductor.compile_free
    clusters = find_clusters(graph)
    compiled: dict[str, Callable[..., Any]] = {}
    calls: dict[str, int] = {}
    owner: dict[fx.Node, int] = {}
    functions = []
    for i, cluster in enumerate(clusters):
        module = outline(cluster)
        key = structural_hash(module)
        if key not in compiled:
            compiled[key] = compile_cluster(module, gm.meta.get(SYMBOLS), compile_module)
        calls[key] = calls.get(key, 0) + 1
        functions.append(compiled[key])
        owner |= dict.fromkeys(cluster.nodes, i)
    steps = _schedule(graph, clusters, functions, owner)
    constants = {n: getattr(gm, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    outputs = next(n for n in graph.nodes if n.op == "output").args[0]
    labels = {id(function): f"cluster_{key}" for key, function in compiled.items()}
    run, source = emit(inputs, constants, steps, outputs, labels)
    return PiecewiseProgram(run, source, calls, _count(graph, owner), time.perf_counter() - start)


def compile_cluster(
    module: fx.GraphModule,
    symbols: Mapping[int, torch.SymInt] | None,
    compile_module: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """The cluster as a callable on its inputs, returning a tuple. ``symbols``: see ``passes.sizes``."""
    values = [g.value(n) for n in module.graph.nodes if n.op == "placeholder"]
    mode = g.fake_mode(module.graph)
    if symbols:
        env = next(iter(symbols.values())).node.shape_env
        mode = FakeTensorMode(shape_env=env)
        symbols = rebased(values, symbols)
        values = [symbolic(v, symbols, mode) for v in values]
    with torch.no_grad(), torch._guards.tracing(torch._guards.TracingContext(mode)):
        return compile_module(module, values)


def _schedule(
    graph: fx.Graph, clusters: list[Cluster], functions: list[Callable[..., Any]], owner: dict[fx.Node, int]
) -> list[Step]:
    """Steps in an order that computes everything before it is read; graph order wherever possible."""
    done: set[fx.Node] = set()
    ran: set[int] = set()
    steps: list[Step] = []

    def run(node: fx.Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            if top in done or top.op in ("placeholder", "get_attr"):
                stack.pop()
                continue
            index = owner.get(top)
            needs = clusters[index].inputs if index is not None else top.all_input_nodes
            waiting = [n for n in needs if n not in done and n.op not in ("placeholder", "get_attr")]
            if waiting:
                stack += reversed(waiting)
                continue
            stack.pop()
            if index is None:
                steps.append(Step((top,), top.target, top.args, top.kwargs))
                done.add(top)
            elif index not in ran:
                cluster = clusters[index]
                results, args = tuple(cluster.outputs), tuple(cluster.inputs)
                steps.append(Step(results, functions[index], args, {}, sequence=True))
                ran.add(index)
                done.update(cluster.nodes)

    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            run(node)
    return steps


def _count(graph: fx.Graph, owner: dict[fx.Node, int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node not in owner:
            name = kind(node).value if kind(node) is not Kind.OPERATOR else g.called(node)
            counts[name] = counts.get(name, 0) + 1
    return counts
