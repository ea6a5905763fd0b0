"""A pass is a value; a report says what each pass did, where, and why not elsewhere."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from llm42c.codegen.implementation import digest_of
from llm42c.codegen.ops.registry import operators
from llm42c.passes.graph import where

PLAIN = "plain"  # a user's model: parameters stay the user's, no packed weights
STOCK = "stock"  # a captured packed graph that keeps the model's own reductions: cleaned, not rewritten
PACKED = "packed"  # a captured packed graph: parameters are get_attr nodes, weights may be packed


@dataclass(frozen=True)
class PositionInput:
    """The placeholder that holds each token's position, and the number of positions there are."""

    placeholder: str
    limit: int


@dataclass(frozen=True)
class Context:
    """What a pass may know besides the graph.

    ``target`` is ``"plain"`` or ``"packed"``. ``grad`` says that the graph will be differentiated, so an
    operator without an autograd formula must not be put into it. ``positions`` allows functions of the
    position to become tables. ``residual_shards`` divides the residual stream of a tensor-parallel graph
    among its ranks.
    """

    target: str = PLAIN
    grad: bool = False
    positions: PositionInput | None = None
    residual_shards: bool = False


def usable(ctx: Context, operator: str) -> str | None:
    """Why an operator must not be put into this graph, or None."""
    if ctx.grad and operators()[operator].backward is None:
        return f"{operator} has no autograd formula"
    return None


@dataclass(frozen=True)
class Event:
    """One place where a pass fired (``reason`` empty) or looked and declined."""

    node: str
    module: str
    reason: str = ""


@dataclass
class PassReport:
    """Matches and misses of one pass, and its time in seconds.

    ``added`` tells where a pass comes from that is not in the list.
    """

    name: str
    added: str = ""
    matches: list[Event] = field(default_factory=list)
    misses: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0

    def match(self, node: fx.Node) -> None:
        self.matches.append(Event(node.name, where(node)))

    def miss(self, node: fx.Node, reason: str) -> None:
        self.misses.append(Event(node.name, where(node), reason))

    def reasons(self) -> dict[str, int]:
        """How often each reason for declining was met."""
        counts: dict[str, int] = {}
        for event in self.misses:
            counts[event.reason] = counts.get(event.reason, 0) + 1
        return counts


@dataclass(frozen=True)
class Pass:
    """A named rewrite of a graph in place.

    ``apply`` is a function, or a ``functools.partial`` of one that gives it options. ``targets`` are the
    kinds of graph it runs on. ``before`` is where a pass that is not in the list stands: in front of the
    first pass of that name. ``makes``: the operators that no other pass makes; a contract that has one shows
    that the pass ran.
    """

    name: str
    apply: Callable[[fx.Graph, Context, PassReport], None]
    targets: frozenset[str] = frozenset({PLAIN, PACKED})
    before: str = "check"
    makes: frozenset[str] = frozenset()

    def function(self) -> tuple[Callable[..., None], list[object]]:
        """``apply`` without its options, and these."""
        function: Callable[..., None] = self.apply
        options: list[object] = []
        while isinstance(function, functools.partial):
            options += [function.args, function.keywords]
            function = function.func
        return inspect.unwrap(function), options

    @property
    def uuid(self) -> str:
        """Digest of the file that the function stands in, of its options and its place.

        Comments and layout do not count; nor do other files that it imports. Raises OSError where the
        function has no file, TypeError where an option is no plain value (None, bool, number, text, and
        lists, tuples and mappings of these).
        """
        function, options = self.function()
        place = [self.name, function.__qualname__, sorted(self.targets), self.before]
        return digest_of([Path(inspect.getfile(function))], json.dumps([place, options], sort_keys=True))

    @property
    def origin(self) -> str:
        """Where it comes from and where it stands, for a report."""
        return f"{self.function()[0].__module__}, before {self.before}, uuid {self.uuid}"


@dataclass
class Report:
    """What the pipeline did, pass by pass, in order.

    ``unplaced`` are the calls of the final graph whose order of reduction is not known, ``notes`` what else
    went another way than usual, a sentence each.
    """

    passes: list[PassReport] = field(default_factory=list)
    unplaced: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> PassReport:
        """The report of the pass of that name; a pass that ran twice is merged."""
        merged = PassReport(name)
        for p in self.passes:
            if p.name == name:
                merged.matches += p.matches
                merged.misses += p.misses
                merged.seconds += p.seconds
        return merged

    def table(self) -> str:
        """Plain text: a line a pass, the reasons of misses below it, unplaced calls and notes at the end."""
        lines = [f"{'pass':<24}{'matches':>8}{'misses':>8}{'calls':>14}{'ms':>9}"]
        for p in self.passes:
            calls = f"{p.nodes_before} → {p.nodes_after}"
            lines.append(
                f"{p.name:<24}{len(p.matches):>8}{len(p.misses):>8}{calls:>14}{p.seconds * 1e3:>9.1f}"
            )
            lines += [f"    added: {p.added}"] if p.added else []
            lines += [f"    not {count}×: {reason}" for reason, count in p.reasons().items()]
        if self.unplaced:
            lines.append("no known order of reduction:")
            lines += [f"    {e.module or '(top)'}: {e.node}: {e.reason}" for e in self.unplaced]
        return "\n".join([*lines, *self.notes]) + "\n"

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.passes)
