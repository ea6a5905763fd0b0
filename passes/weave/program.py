"""Weave the two halves of a graph's tokens, so that one computes while the other's collective is on its way.

The halves (``split.py``) run as two coroutines: each computes up to its next collective, starts it and
gives way; it goes on when the collective is done and the other half has given way. In which order they take
turns, how many tokens the first half gets, and whether it is worth while at all, follows from the number of
tokens alone (``schedule.py``).

Before and after (one decoder layer; A: norm, attention, output projection; M: norm, MLP; ⇢ starts, ⇠ waits;
h: [T, H], h0: [T0, H], h1: [T - T0, H])::

    a = A(h)             a0 = A(h0)
    s ⇢ all_reduce(a)    s0 ⇢ all_reduce(a0)
    h = h + ⇠ s          a1 = A(h1, k0, v0)         # meanwhile s0
    m = M(h)             s1 ⇢ all_reduce(a1)
    t ⇢ all_reduce(m)    h0 = h0 + ⇠ s0
    h = h + ⇠ t      →   m0 = M(h0)                 # meanwhile s1
                         t0 ⇢ all_reduce(m0)
                         h1 = h1 + ⇠ s1
                         m1 = M(h1)                 # meanwhile t0
                         t1 ⇢ all_reduce(m1)
                         h0 = h0 + ⇠ t0             # the next layer; meanwhile t1

(The scheme is TokenWeave's, MLSys 2026, section 4, with events in place of its joins: a half waits for its
own collective only.)

Each call of the woven graph is a call of the divided graph on the same values, so weaving changes no bit;
dividing changes none where operators compute rows independently.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from llm42c.passes.weave import communication as comm
from llm42c.passes.weave.schedule import Decision, Pieces, pieces_of_split
from llm42c.passes.weave.split import Split, copied

SEGMENT, START, WAIT = "segment", "start", "wait"


@dataclass(frozen=True)
class Turn:
    """One step of the woven program: a segment, or the start of a transfer or the wait for one."""

    what: str
    key: str


def turns(p: Pieces, order: tuple[str, ...]) -> list[Turn]:
    """Segments in ``order``; a transfer is started as soon as its message is there, and waited for by the
    first segment that reads it."""
    needs: dict[str, list[str]] = {}
    for source, key in sorted(p.edges):
        needs.setdefault(key, []).append(source)
    out: list[Turn] = []
    done: set[str] = set()
    begun: set[str] = set()

    def begin(key: str) -> None:
        if key not in begun:
            for source in needs.get(key, []):
                settle(source)
            begun.add(key)
            out.append(Turn(START, key))

    def settle(key: str) -> None:
        if key in p.transfers and key not in done:
            begin(key)
            done.add(key)
            out.append(Turn(WAIT, key))

    for segment in order:
        for source in needs.get(segment, []):
            settle(source)
        out.append(Turn(SEGMENT, segment))
        done.add(segment)
        ready = [k for k in p.transfers if k not in begun and all(s in done for s in needs.get(k, []))]
        for key in sorted(ready, key=lambda k: p.transfers[k].index):
            begin(key)
    for key in p.transfers:
        settle(key)
    return out


def sequential_order(p: Pieces) -> tuple[str, ...]:
    """All of the first half, then all of the second, then what needs both: nothing overlaps."""
    return tuple(sorted(p.segments, key=lambda k: (_late(p, k), p.segments[k].half, p.segments[k].level)))


def _late(p: Pieces, key: str) -> int:
    """What is computed once comes first, unless it reads a half."""
    segment = p.segments[key]
    if segment.half >= 0:
        return 1
    reads = [s for s, k in p.edges if k == key]
    return 2 if any((s in p.segments or s in p.transfers) for s in reads if not s.startswith("w")) else 0


def token_weave(split: Split, decision: Decision) -> fx.GraphModule:
    """The divided graph in the order of ``decision``; it computes the same whatever the order."""
    return in_order(split, decision.order)


def in_order(split: Split, order: tuple[str, ...]) -> fx.GraphModule:
    """The divided graph with its segments in ``order``."""
    gm = copied(split.gm)
    place = dict(zip(split.gm.graph.nodes, gm.graph.nodes, strict=True))
    p = pieces_of_split(split)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    for turn in turns(p, order):
        if turn.what == SEGMENT:
            moved = p.segments[turn.key].nodes
        else:
            transfer = p.transfers[turn.key]
            moved = [transfer.start if turn.what == START else transfer.wait]
        for node in moved:
            output.prepend(place[node])
    gm.graph.lint()
    gm.recompile()
    return gm


def sites(gm: fx.GraphModule) -> int:
    """Collectives of a graph."""
    return sum(comm.is_collective(n) or comm.is_start(n) for n in gm.graph.nodes)
