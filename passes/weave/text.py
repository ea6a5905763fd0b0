"""A weaving plan as text: its costs, its decisions, one schedule, and drawings of the graph of pieces."""

from __future__ import annotations

from collections.abc import Iterable

import sympy  # type: ignore[import-untyped]

from llm42c.passes.weave import communication as comm
from llm42c.passes.weave.cost import Rates, rounded
from llm42c.passes.weave.schedule import COMPUTE, MARGIN, WHOLE, Decision, Pieces, Planner, critical_path
from llm42c.passes.weave.split import Split

_TOKENS = (1, 2, 16, 64, 256, 1024, 4096)
_WIDTH = 100  # columns of the drawn schedule
_FIRST = 12  # pieces that a drawing shows


def describe_plan(planner: Planner, tokens: Iterable[int] = _TOKENS) -> str:
    """What a plan does for these numbers of tokens, and why."""
    decisions = [planner.decide(n) for n in tokens]
    lines = [f"plan {planner.hash[:16]}", _rates(planner.rates), *_split(planner.split), ""]
    lines += [*_costs(planner), ""]
    lines += _decisions(decisions)
    woven = [d for d in decisions if d.weaves]
    if woven:
        lines += ["", *_critical(planner, woven[-1]), "", *_timeline(planner, woven[-1])]
    return "\n".join(lines) + "\n"


def _rates(r: Rates) -> str:
    link = f"a collective {r.latency * 1e6:.3g} µs + bytes / {r.link / 1e9:.3g} GB/s"
    link += f", taking {r.taken:.0%} of the processor" if r.taken else ""
    tiles = f", {r.units} × tiles of {r.tile_m} × {r.tile_n}" if r.units > 1 else ""
    return f"{r.flops / 1e9:.3g} GFLOP/s{tiles}, memory {r.bandwidth / 1e9:.3g} GB/s, {link}"


def _split(split: Split) -> list[str]:
    total = sum(comm.is_collective(n) for n in split.original.graph.nodes)
    lines = [f"{split.collectives} of {total} collectives divided"]
    lines += [f"halves joined at {name}: {reason}" for name, reason in split.joined]
    order = len(split.ordered)
    return lines + (
        [f"{order} × the second half attends after the first has written its keys"] if order else []
    )


def _costs(planner: Planner) -> list[str]:
    """Equal expressions once, with the pieces that have them."""
    keys: dict[sympy.Expr, list[str]] = {}
    for key, cost in planner.woven_cost.items():
        keys.setdefault(cost, []).append(key)
    lines = ["microseconds of n tokens behind s others:"]
    for cost, having in keys.items():
        more = f" and {len(having) - 3} more" if len(having) > 3 else ""
        lines.append(f"    {', '.join(having[:3])}{more}: {rounded(cost)}")
    return lines


def _decisions(decisions: list[Decision]) -> list[str]:
    lines = [f"{'tokens':>8}{'cut at':>8}{'whole ms':>11}{'woven ms':>11}{'hidden':>8}  verdict"]
    for d in decisions:
        woven = f"{d.woven_seconds * 1e3:.3f}" if d.woven is not None else "–"
        hidden = f"{d.woven.hidden:.0%}" if d.woven is not None else "–"
        cut = str(d.tokens_0) if d.weaves else "no"
        numbers = f"{d.tokens:>8}{cut:>8}{d.plain_seconds * 1e3:>11.3f}{woven:>11}{hidden:>8}"
        lines.append(f"{numbers}  {verdict(d)}")
    return lines


def verdict(d: Decision) -> str:
    """What was decided, and why."""
    if d.woven is None:
        return "whole: there is nothing to divide"
    saved = 1.0 - d.woven_seconds / d.plain_seconds
    change = f"saves {saved:.0%}" if saved >= 0 else f"costs {-saved:.0%} more"
    if d.weaves:
        return f"woven: {change}" if saved >= MARGIN else f"woven because it was asked for: {change}"
    return f"whole: weaving {change}" + (f", less than {MARGIN:.0%}" if saved >= 0 else "")


def _critical(planner: Planner, d: Decision) -> list[str]:
    path, left = critical_path(planner.woven_dag, planner.woven_seconds(d.tokens, d.tokens_0))
    shown = " → ".join(path[:_FIRST]) + (f" → … ({len(path)} pieces)" if len(path) > _FIRST else "")
    seconds = left[path[0]] * 1e3 if path else 0.0
    return [
        f"critical path of {d.tokens} tokens, {seconds:.3f} ms without waiting for the processor:",
        f"    {shown}",
    ]


def _timeline(planner: Planner, d: Decision) -> list[str]:
    """The first pieces, drawn to scale."""
    if d.woven is None:
        return []
    events = sorted(d.woven.events, key=lambda e: (e.begin, e.resource))[: 2 * _FIRST]
    scale = _WIDTH / max(e.end for e in events)
    lines = [f"schedule of {d.tokens} tokens, cut at {d.tokens_0} (first {len(events)} pieces):"]
    for e in events:
        begin, end = int(e.begin * scale), int(e.end * scale)
        bar = " " * begin + ("█" if e.resource == COMPUTE else "░") * max(end - begin, 1)
        lines.append(f"    {e.key:>8} {bar}")
    return lines


def _nodes(p: Pieces) -> list[tuple[str, str, int, bool]]:
    """(key, label, half, is a transfer)."""
    found = [(k, f"segment {s.level}", s.half, False) for k, s in p.segments.items()]
    return found + [(k, comm.collective_name(t.start), t.half, True) for k, t in p.transfers.items()]


def to_dot(p: Pieces) -> str:
    """The graph of pieces for Graphviz: boxes compute, ellipses communicate, a colour a half."""
    colours = {0: "lightblue", 1: "lightsalmon", WHOLE: "lightgrey"}
    lines = ["digraph weave {", "  rankdir=LR; node [style=filled];"]
    for key, label, half, transfer in _nodes(p):
        shape = "ellipse" if transfer else "box"
        lines.append(f'  "{key}" [label="{key}\\n{label}", shape={shape}, fillcolor={colours[half]}];')
    lines += [f'  "{a}" -> "{b}";' for a, b in sorted(p.edges)]
    return "\n".join([*lines, "}"]) + "\n"


def to_mermaid(p: Pieces) -> str:
    """The graph of pieces for Mermaid."""
    name = {key: f"p{i}" for i, (key, *_) in enumerate(_nodes(p))}
    lines = ["flowchart LR"]
    for key, label, _, transfer in _nodes(p):
        left, right = ("([", "])") if transfer else ("[", "]")
        lines.append(f'  {name[key]}{left}"{key}<br/>{label}"{right}')
    return "\n".join([*lines, *(f"  {name[a]} --> {name[b]}" for a, b in sorted(p.edges))]) + "\n"
