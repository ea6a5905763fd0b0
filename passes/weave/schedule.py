"""When does which half run: segments and collectives as a graph, its critical path, and what to do about it.

A *segment* is what one half computes between two of its collectives; a *transfer* is a collective. They form
a directed acyclic graph. There is one processor, which runs segments, and one link, which runs transfers in
the order in which they are started. :func:`schedule` runs through this in simulated time: whenever the
processor is free it takes the segment that can begin first and, of several, the one with the longest way to
the end (list scheduling by critical path). While a transfer is under way the processor computes at
``1 - taken`` of its speed: sending and adding may be its work too. The order that results is what is
executed; nothing is decided while tensors are there, so every rank that has the same graph and the same rates
does the same.

:class:`Planner` compares the time of the woven graph with that of the unchanged one for a number of tokens
and for a few ways to cut it (half, and the multiples of the tile next to it, where the waves of the halves
may add up to those of the whole), and weaves only where that is predicted to save ``MARGIN``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx  # type: ignore[import-untyped]
import sympy  # type: ignore[import-untyped]
from torch import fx

from llm42c.passes.weave import communication as comm
from llm42c.passes.weave.cost import BEFORE, N, Rates, call_cost, transfer_cost
from llm42c.passes.weave.split import ALL_TOKENS, HALF, HALF_SIZES, Split

MARGIN = 0.05  # predicted gain below which a graph is not woven
WHOLE = -1  # in place of the number of a half
COMPUTE, LINK = "compute", "link"


@dataclass
class Segment:
    """What ``half`` (0, 1 or WHOLE) computes between its ``level``-th collective and the next."""

    half: int
    level: int
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{'w' if self.half == WHOLE else self.half}.{self.level}"


@dataclass
class Transfer:
    """One collective of a half."""

    half: int
    index: int
    start: fx.Node
    wait: fx.Node

    @property
    def key(self) -> str:
        return f"{'w' if self.half == WHOLE else self.half}:t{self.index}"


@dataclass
class Pieces:
    """A graph as segments and transfers. ``edges``: key before key. ``tokens``: primes by half."""

    segments: dict[str, Segment]
    transfers: dict[str, Transfer]
    edges: set[tuple[str, str]]
    tokens: dict[int, int]
    owner: dict[fx.Node, str]


def pieces_of_split(split: Split) -> Pieces:
    """The pieces of a divided graph."""
    tokens = {0: HALF_SIZES[0], 1: HALF_SIZES[1], WHOLE: ALL_TOKENS}
    return _pieces(split.gm.graph, tokens, split.ordered)


def pieces_of_whole(split: Split) -> Pieces:
    """The pieces of the graph before it was divided."""
    return _pieces(split.original.graph, {WHOLE: split.prime}, [])


def _pieces(graph: fx.Graph, tokens: dict[int, int], ordered: list[tuple[fx.Node, fx.Node]]) -> Pieces:
    level: dict[fx.Node, int] = {}
    p = Pieces({}, {}, set(), tokens, {})
    later = {b: a for a, b in ordered}
    for node in graph.nodes:
        above = [*node.all_input_nodes, *([later[node]] if node in later else [])]
        level[node] = max((level[n] for n in above), default=0) + comm.is_wait(node)
        if node.op not in ("call_function", "call_method"):
            continue
        half = node.meta.get(HALF)
        half = WHOLE if half is None else half
        if comm.is_start(node):
            waits = [u for u in node.users if comm.is_wait(u)]
            transfer = Transfer(half, len(p.transfers), node, waits[0])
            p.transfers[transfer.key] = transfer
            p.owner[node] = p.owner[waits[0]] = transfer.key
        elif not comm.is_wait(node):
            segment = Segment(half, level[node])
            p.segments.setdefault(segment.key, segment).nodes.append(node)
            p.owner[node] = segment.key
    for node in p.owner:
        for source in (*node.all_input_nodes, *([later[node]] if node in later else [])):
            if source in p.owner and p.owner[source] != p.owner[node]:
                p.edges.add((p.owner[source], p.owner[node]))
    return p


@dataclass(frozen=True)
class Event:
    """A piece in simulated time."""

    key: str
    resource: str
    begin: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """The order in which segments run, the simulated time of every piece, and how long they compute when
    nothing is under way."""

    order: tuple[str, ...]
    events: tuple[Event, ...]
    seconds: float
    compute: float

    @property
    def hidden(self) -> float:
        """The share of the transfers' time that does not make the step longer."""
        total = sum(e.end - e.begin for e in self.events if e.resource == LINK)
        exposed = self.seconds - self.compute
        return 1.0 - min(max(exposed, 0.0) / total, 1.0) if total else 1.0


def dag_of(p: Pieces) -> nx.DiGraph:
    """Pieces as nodes; raises networkx.NetworkXUnfeasible for a graph that waits for itself."""
    dag = nx.DiGraph()
    dag.add_nodes_from([*p.segments, *p.transfers])
    dag.add_edges_from(sorted(p.edges))
    if not nx.is_directed_acyclic_graph(dag):
        raise nx.NetworkXUnfeasible("a segment waits for itself")
    return dag


def critical_path(dag: nx.DiGraph, seconds: dict[str, float]) -> tuple[list[str], dict[str, float]]:
    """The longest path, and for each piece the time from its beginning to the end of everything."""
    left: dict[str, float] = {}
    for key in reversed(list(nx.lexicographical_topological_sort(dag))):
        left[key] = seconds[key] + max((left[n] for n in dag.successors(key)), default=0.0)
    path: list[str] = []
    following = sorted(dag.nodes, key=lambda k: (-left[k], k))[:1]
    while following:
        path.append(following[0])
        following = sorted(dag.successors(path[-1]), key=lambda k: (-left[k], k))[:1]
    return path, left


def schedule(p: Pieces, dag: nx.DiGraph, seconds: dict[str, float], taken: float = 0.0) -> Schedule:
    """List scheduling by critical path on one processor and one link; ``taken``: see ``Rates``."""
    _, left = critical_path(dag, seconds)
    missing = {key: dag.in_degree(key) for key in dag.nodes}
    ready = {key for key in p.segments if not missing[key]}
    ended: dict[str, float] = {}
    clock = {COMPUTE: 0.0, LINK: 0.0}
    events: list[Event] = []
    order: list[str] = []
    under_way: deque[tuple[float, float]] = deque()  # transfers, by time

    def finish(key: str, resource: str) -> None:
        possible = max((ended[n] for n in dag.predecessors(key)), default=0.0)
        begin = max(clock[resource], possible)
        if resource == LINK:
            end = begin + seconds[key]
            under_way.append((begin, end))
        else:
            end = _slowed(begin, seconds[key], under_way, taken)
        clock[resource] = ended[key] = end
        events.append(Event(key, resource, begin, ended[key]))
        for follower in sorted(dag.successors(key), key=lambda k: (_index(p, k), k)):
            missing[follower] -= 1
            if missing[follower]:
                continue
            if follower in p.transfers:
                finish(follower, LINK)
            else:
                ready.add(follower)

    while ready:

        def urgency(key: str) -> tuple[float, float, str]:
            possible = max((ended[n] for n in dag.predecessors(key)), default=0.0)
            return max(clock[COMPUTE], possible), -left[key], key

        chosen = min(ready, key=urgency)
        ready.discard(chosen)
        order.append(chosen)
        finish(chosen, COMPUTE)
    compute = sum(seconds[key] for key in order)
    return Schedule(tuple(order), tuple(events), max(clock.values()), compute)


def _slowed(begin: float, seconds: float, under_way: deque[tuple[float, float]], taken: float) -> float:
    """When a segment of ``seconds`` ends that runs from ``begin`` beside transfers; forgets earlier ones."""
    while under_way and under_way[0][1] <= begin:
        under_way.popleft()
    now, left = begin, seconds
    for start, end in under_way if taken else ():
        free = max(start - now, 0.0)
        if free >= left:
            break
        now, left = max(start, now), left - free
        done = (end - now) * (1.0 - taken)
        if done >= left:
            return now + left / (1.0 - taken)
        now, left = end, left - done
    return now + left


def _index(p: Pieces, key: str) -> int:
    return p.transfers[key].index if key in p.transfers else -1


@dataclass(frozen=True)
class Decision:
    """What to do with ``tokens`` tokens: cut in front of token ``tokens_0``, or not at all if it is 0.

    ``woven_seconds`` is infinite where there is nothing to cut.
    """

    tokens: int
    tokens_0: int
    plain_seconds: float
    woven_seconds: float
    plain: Schedule
    woven: Schedule | None

    @property
    def weaves(self) -> bool:
        return self.tokens_0 > 0

    @property
    def order(self) -> tuple[str, ...]:
        return self.woven.order if self.weaves and self.woven is not None else self.plain.order


Costs = tuple[dict[str, sympy.Expr], dict[str, sympy.Expr]]


class Planner:
    """Decides for one graph on one target; equal for equal graphs and rates.

    ``always`` weaves wherever there are two tokens, whatever it costs.
    """

    def __init__(self, split: Split, rates: Rates, *, always: bool = False) -> None:
        self.rates, self.always = rates, always
        self.split = split
        self.woven, self.plain = pieces_of_split(split), pieces_of_whole(split)
        self.woven_dag, self.plain_dag = dag_of(self.woven), dag_of(self.plain)
        self.adopt((_costs(self.woven, rates), _costs(self.plain, rates)))

    @property
    def costs(self) -> Costs:
        """Seconds of every piece of the woven and of the plain graph."""
        return self.woven_cost, self.plain_cost

    def adopt(self, costs: Costs) -> None:
        """Decide by these ``costs``, which may be another rank's.

        Ranks that hold parts of different sizes see different costs, and must take the same decisions.
        """
        self.woven_cost, self.plain_cost = costs
        self._woven_fast, self._plain_fast = _compiled(self.woven_cost), _compiled(self.plain_cost)
        self._decided = functools.lru_cache(maxsize=4096)(self._decide)

    def decide(self, tokens: int, always: bool | None = None) -> Decision:
        """What to do with ``tokens`` tokens; ``always`` overrides the planner's own."""
        return self._decided(tokens, self.always if always is None else always)

    def candidates(self, tokens: int) -> list[int]:
        """Where to cut: in the middle, and at the multiples of the tile around it."""
        tile, middle = self.rates.tile_m, (tokens + 1) // 2
        near = [tile * (middle // tile + i) for i in (-1, 0, 1, 2)] if tile > 1 else []
        return sorted({n for n in (middle, *near) if 0 < n < tokens}, key=lambda n: (abs(n - middle), n))

    def _decide(self, tokens: int, always: bool) -> Decision:
        plain = schedule(self.plain, self.plain_dag, self.plain_seconds(tokens), self.rates.taken)
        best: tuple[float, int, Schedule] | None = None
        for tokens_0 in self.candidates(tokens):
            seconds = self.woven_seconds(tokens, tokens_0)
            found = schedule(self.woven, self.woven_dag, seconds, self.rates.taken)
            if best is None or found.seconds < best[0]:
                best = (found.seconds, tokens_0, found)
        if best is None:
            return Decision(tokens, 0, plain.seconds, float("inf"), plain, None)
        gains = always or best[0] <= (1.0 - MARGIN) * plain.seconds
        return Decision(tokens, best[1] if gains else 0, plain.seconds, best[0], plain, best[2])

    def plain_seconds(self, tokens: int) -> dict[str, float]:
        return {key: f(tokens, 0) for key, f in self._plain_fast.items()}

    def woven_seconds(self, tokens: int, tokens_0: int) -> dict[str, float]:
        """Seconds of every piece when the cut is in front of token ``tokens_0``."""
        sizes = {0: (tokens_0, 0), 1: (tokens - tokens_0, tokens_0), WHOLE: (tokens, 0)}
        half = {key: s.half for key, s in self.woven.segments.items()}
        half |= {key: t.half for key, t in self.woven.transfers.items()}
        return {key: f(*sizes[half[key]]) for key, f in self._woven_fast.items()}

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of everything that a decision depends on besides the number of tokens."""
        content = [
            _structure(self.split.gm.graph),
            sorted(self.woven.edges),
            {key: str(e) for key, e in self.woven_cost.items()},
            {key: str(e) for key, e in self.plain_cost.items()},
            self.rates.tile_m,
            self.rates.taken,
            self.always,
            MARGIN,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _costs(p: Pieces, rates: Rates) -> dict[str, sympy.Expr]:
    found = {}
    for key, segment in p.segments.items():
        found[key] = sympy.Add(*(call_cost(n, p.tokens[segment.half], rates) for n in segment.nodes))
    for key, transfer in p.transfers.items():
        found[key] = transfer_cost(transfer.start, p.tokens[transfer.half], rates)
    return found


def _compiled(costs: dict[str, sympy.Expr]) -> dict[str, Callable[[int, int], float]]:
    """Expressions as functions of (n, s); equal ones are compiled once."""
    functions = {e: sympy.lambdify((N, BEFORE), e, modules="math") for e in dict.fromkeys(costs.values())}
    return {key: functions[e] for key, e in costs.items()}


def _structure(graph: fx.Graph) -> list[str]:
    """What ranks must have in common: the calls, what they read, and everything that collectives are given.

    Other numbers are a rank's own where it holds a part, such as the first row of a divided embedding.
    """
    number = {node: i for i, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        reads: Any = [f"%{number[n]}" for n in node.all_input_nodes]
        if comm.is_start(node) or comm.is_collective(node):
            reads = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{number[n]}")
        target = (
            ""
            if node.op == "placeholder"
            else fx.node._get_qualified_name(node.target)
            if callable(node.target)
            else node.target
        )
        lines.append(f"{node.op} {target} {reads} {node.meta.get(HALF)}")
    return lines
