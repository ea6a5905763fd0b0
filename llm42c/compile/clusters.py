"""Find what Inductor should compile between the llm42 operators of a packed graph, and outline it.

The operators, and calls that Inductor does not get, form a skeleton. The other tensor calls are grouped into
clusters: maximal connected sets with the same number of the former above them, so that a cluster can run in
one piece. A cluster that only moves data, or that is one exactly rounded call, is not worth a kernel and runs
as it stands.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes.kinds import Kind, kind

_COMPILED = (Kind.VIEW, Kind.MOVE, Kind.EXACT, Kind.TRANSCENDENTAL, Kind.EXACT_REDUCTION, Kind.REDUCTION)


@dataclass
class Cluster:
    """Nodes that run as one compiled function: ``outputs = f(*inputs)``."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]

    @property
    def module(self) -> str:
        """Module path of the first node, for dumps."""
        return g.where(self.nodes[0])


def _levels(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many calls that are in no cluster lie on the longest path from an input to each node."""
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        above = [level[n] + (_is_call(n) and kind(n) not in _COMPILED) for n in node.all_input_nodes]
        level[node] = max(above, default=0)
    return level


def _is_call(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method")


def _components(members: list[fx.Node], level: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """Connected sets of equal level, each in graph order."""
    parent = {node: node for node in members}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in members:
        for source in node.all_input_nodes:
            if source in parent and level[source] == level[node]:
                parent[find(source)] = find(node)
    sets: dict[fx.Node, list[fx.Node]] = {}
    for node in members:
        sets.setdefault(find(node), []).append(node)
    return list(sets.values())


def _trim(nodes: list[fx.Node]) -> list[fx.Node]:
    """Without views at the end that only others use (outputs own their storage), and with whole tuples."""
    kept = set(nodes)
    for node in reversed(nodes):
        if kind(node) is Kind.VIEW and not any(u in kept for u in node.users):
            kept.discard(node)
    for node in nodes:  # a call that returns a tuple needs its accesses beside it
        if (
            node in kept
            and not isinstance(g.value(node), torch.Tensor)
            and any(u not in kept for u in node.users)
        ):
            kept.discard(node)
    # And an access needs its call: a tuple as input would hide the sizes of its tensors.
    return [
        n for n in nodes if n in kept and not any(_is_tuple(s) and s not in kept for s in n.all_input_nodes)
    ]


def _is_tuple(node: fx.Node) -> bool:
    v = g.value(node)
    return isinstance(v, (tuple, list)) and any(isinstance(item, torch.Tensor) for item in v)


def _convex(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Divided so that no part reads what is computed outside of it from its own results."""
    parts: list[list[fx.Node]] = []
    while nodes:
        inside, outside = set(nodes), set()
        kept: list[fx.Node] = []
        node = nodes[0]
        while node is not nodes[-1].next:
            if any(s in outside for s in node.all_input_nodes):
                outside.add(node)
            elif node in inside:
                kept.append(node)
            elif any(s in inside for s in node.all_input_nodes):
                outside.add(node)
            node = node.next
        parts.append(kept)
        nodes = [n for n in nodes if n in outside]
    return parts


def _is_worthwhile(nodes: list[fx.Node]) -> bool:
    kinds = [kind(n) for n in nodes]
    if any(k in (Kind.TRANSCENDENTAL, Kind.REDUCTION) for k in kinds):
        return True
    return sum(k is Kind.EXACT for k in kinds) >= 2


def find_clusters(graph: fx.Graph) -> list[Cluster]:
    """The clusters of a graph, in the order in which they can run.

    A graph that writes to tensors outside of llm42 operators has none: its calls keep their order.
    """
    if any(g.mutated_arguments(n) and not g.ours(n) for n in graph.nodes):
        return []
    level = _levels(graph)
    calls = [n for n in graph.nodes if _is_call(n) and kind(n) in _COMPILED]
    clusters = []
    for nodes in (part for component in _components(calls, level) for part in _convex(_trim(component))):
        if not _is_worthwhile(nodes):
            continue
        inside = set(nodes)
        inputs = list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside))
        outputs = [n for n in nodes if any(u not in inside for u in n.users)]
        clusters.append(Cluster(nodes, inputs, outputs))
    return clusters


def outline(cluster: Cluster) -> fx.GraphModule:
    """The cluster as a module of its own, with the fakes of the original graph as values."""
    inner = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for source in cluster.inputs:
        placeholder = inner.placeholder(f"arg{len(copied)}")
        placeholder.meta[g.VALUE] = g.value(source)
        copied[source] = placeholder
    for node in cluster.nodes:
        new = inner.node_copy(node, lambda n: copied[n])
        new.meta = {g.VALUE: g.value(node)}
        copied[node] = new
    inner.output(tuple(copied[n] for n in cluster.outputs))
    inner.lint()
    return fx.GraphModule(torch.nn.Module(), inner)


def structural_hash(gm: fx.GraphModule) -> str:
    """Equal for modules that compute the same on inputs of the same shapes, dtypes and strides."""
    number = {node: i for i, node in enumerate(gm.graph.nodes)}
    lines = []
    for node in gm.graph.nodes:
        args = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        lines.append(f"{node.op} {callee_of(node)} {args} {_layout(g.value(node))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def callee_of(node: fx.Node) -> str:
    """What a node calls or reads, overloads apart, as text that tells no two functions of torch the same."""
    if node.op == "placeholder" or isinstance(node.target, str):
        return "" if node.op == "placeholder" else str(node.target)
    own = getattr(node.target, "__name__", node.target)
    return f"{getattr(node.target, '__module__', '')}.{own}"


def _layout(v: Any) -> str:
    if isinstance(v, torch.Tensor):
        return f"{v.dtype} {tuple(v.shape)} {v.stride()} {v.device}"
    return str(v)
