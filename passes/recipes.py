"""Packed weights as recipes: a pass says *what* a constant is made of; nobody copies data yet.

A packed constant is a ``get_attr`` node whose recipe lists the parameters to stack. The caller of the
pipeline materialises it afterwards (``llm42c.compile.weights``), once, and may then free the originals. The
attribute on the graph's module is a meta tensor until then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from llm42c.passes import graph as g

RECIPE = "llm42_recipe"


@dataclass(frozen=True)
class Part:
    """One parameter in a stack: its ``get_attr`` target, and whether it is stored [K, N]."""

    attribute: str
    transposed: bool = False


@dataclass(frozen=True)
class PackedWeight:
    """``linear_pack(cat([part, …], dim=0))`` with every part as [n_i, K]."""

    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        """Attribute name of the packed constant, unique for its contents."""
        return "packed__" + "__".join(p.attribute + ("_t" if p.transposed else "") for p in self.parts)


@dataclass(frozen=True)
class StackedBias:
    """``cat([part, …])`` of bias vectors."""

    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        return "stacked__" + "__".join(p.attribute for p in self.parts)


@dataclass(frozen=True, eq=False)
class PositionTable:
    """``graph(positions)`` for the positions ``arange(limit)``; ``graph`` reads module attributes."""

    graph: fx.Graph
    name: str
    limit: int = 0

    @property
    def label(self) -> str:
        return f"table__{self.name}"


Recipe = PackedWeight | StackedBias | PositionTable


def part(weight: fx.Node, transposed: bool) -> Part | None:
    """The part that a parameter node stands for; None for a computed weight."""
    return Part(str(weight.target), transposed) if weight.op == "get_attr" else None


def constant(graph: fx.Graph, recipe: PackedWeight | StackedBias) -> fx.Node:
    """The ``get_attr`` node of a recipe: at the top of the graph, one node however often it is used."""
    attributes: dict[str, fx.Node] = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}
    if recipe.label in attributes:
        return attributes[recipe.label]
    sources = [attributes[p.attribute] for p in recipe.parts]
    _module(graph).register_buffer(recipe.label, torch.empty(0, device="meta"), persistent=False)
    values = [g.tensor(s) for s in sources]
    with g.fake_execution(graph):
        rows = [v.t() if p.transposed else v for v, p in zip(values, recipe.parts, strict=True)]  # type: ignore[union-attr]
        stacked = torch.cat(rows)  # type: ignore[arg-type]
        value = torch.ops.llm42.linear_pack(stacked) if isinstance(recipe, PackedWeight) else stacked
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(recipe.label)
    node.meta[g.VALUE] = value
    node.meta[RECIPE] = recipe
    return node


def table_constant(
    graph: fx.Graph, recipe: PositionTable, like: torch.Tensor, axis: int, limit: int
) -> fx.Node:
    """The ``get_attr`` node of a table: ``like`` with ``limit`` rows along ``axis``."""
    recipe = PositionTable(recipe.graph, recipe.name, limit)
    _module(graph).register_buffer(recipe.label, torch.empty(0, device="meta"), persistent=False)
    sizes = [limit if i == axis else size for i, size in enumerate(like.shape)]
    with g.fake_execution(graph):
        value = torch.empty(sizes, dtype=like.dtype, device=like.device)
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(recipe.label)
    node.meta |= {g.VALUE: value, RECIPE: recipe}
    return node


def _module(graph: fx.Graph) -> torch.nn.Module:
    if graph.owning_module is None:
        raise ValueError("the graph belongs to no module")
    return graph.owning_module


def recipes(graph: fx.Graph) -> dict[str, Recipe]:
    """Every packed constant that the graph still uses, by attribute."""
    return {str(n.target): n.meta[RECIPE] for n in graph.nodes if n.op == "get_attr" and RECIPE in n.meta}
