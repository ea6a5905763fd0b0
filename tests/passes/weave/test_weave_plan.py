"""The plan: order of the halves, when it declines, where it cuts, and what it prints."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque

import networkx as nx
import pytest
import torch
import weave_graphs as wg

from llm42c.codegen import quant
from llm42c.codegen.device import Device, UnknownDeviceError, Value
from llm42c.codegen.ops import registry
from llm42c.codegen.triton.devices import from_table
from llm42c.passes import graph as g
from llm42c.passes.weave import schedule as weave_plan
from llm42c.passes.weave.cost import N, Rates, call_cost
from llm42c.passes.weave.program import SEGMENT, START, WAIT, in_order, sequential_order, token_weave, turns
from llm42c.passes.weave.schedule import MARGIN, Planner, critical_path, dag_of, pieces_of_split, schedule
from llm42c.passes.weave.split import HALF_SIZES, split_tokens
from llm42c.passes.weave.text import describe_plan, to_dot, to_mermaid


@pytest.fixture(scope="module")
def split():
    with wg.group():
        yield split_tokens(wg.Graph(wg.model(2), wg.tokens(12), 1).gm)


def _planner(split, **changes) -> Planner:
    return Planner(split, dataclasses.replace(wg.RATES, **changes))


def _slow_link(split, share: float = 0.3, tokens: int = 512) -> Rates:
    """Rates with which communication is this share of the time of ``tokens`` tokens."""
    planner = _planner(split, latency=0.0, link=1e30)
    compute = planner.decide(tokens).plain_seconds
    nbytes = 4 * tokens * wg.HIDDEN * 4  # four collectives of fp32 rows
    return dataclasses.replace(wg.RATES, latency=0.0, link=nbytes / (compute * share / (1 - share)))


def _panels(n: int, k: int, name: str) -> torch.Tensor:
    form = quant.format_of(name)
    shape = (-(-n // quant.COLUMNS), k // form.block, form.panel_bytes)
    return torch.empty(shape, dtype=torch.uint8, device="meta")


@pytest.mark.parametrize(
    ("name", "weights", "arguments", "columns"),
    [
        ("linear_dense", [torch.empty(48, 64, device="meta")], lambda w: (*w, None), 48),
        ("linear_silu_mul", [torch.empty(2, 64, 48, device="meta")], lambda w: (*w, 48), 96),
        (
            "linear_q",
            [_panels(48, 64, "q8_0"), _panels(48, 64, "q4_0")],
            lambda w: (w, "q8_0,q4_0", [48, 48], None, None, True),
            96,
        ),
    ],
)
def test_a_product_costs_what_its_operator_says(name, weights, arguments, columns):
    """2 * K operations for each of its columns, of which a gated one's result has half; its weights once."""
    registry.define()
    graph, tokens = torch.fx.Graph(), min(HALF_SIZES)
    values = [torch.empty(tokens, 64, device="meta"), *weights]
    nodes = [graph.placeholder(f"x{i}") for i in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta[g.VALUE] = value
    target = getattr(torch.ops.llm42, name).default
    call = graph.call_function(target, (nodes[0], *arguments(nodes[1:])))
    call.meta[g.VALUE] = torch.empty(tokens, 48, device="meta")
    one = dataclasses.replace(wg.RATES, flops=1.0, units=1, tile_m=1, tile_n=1, call=0.0)
    computing = call_cost(call, tokens, dataclasses.replace(one, bandwidth=math.inf))
    assert float(computing.subs(N, 10)) == 2 * 10 * 64 * columns
    reading = call_cost(call, tokens, dataclasses.replace(one, flops=math.inf, bandwidth=1.0))
    assert float(reading.subs(N, 0)) == sum(w.nbytes for w in weights)


def test_halves_take_turns(split):
    planner = Planner(split, _slow_link(split))
    decision = planner.decide(512)
    assert decision.weaves
    halves = [planner.woven.segments[k].half for k in decision.order if planner.woven.segments[k].half >= 0]
    assert halves[:6] == [0, 1, 0, 1, 0, 1]


def test_a_transfer_is_under_way_while_the_other_half_computes(split):
    planner = Planner(split, _slow_link(split))
    steps = turns(planner.woven, planner.decide(512).order)
    for i, step in enumerate(steps):
        if step.what == START and planner.woven.transfers[step.key].half == 0:
            end = next(j for j, s in enumerate(steps) if s.what == WAIT and s.key == step.key)
            between = [planner.woven.segments[s.key].half for s in steps[i:end] if s.what == SEGMENT]
            assert 1 in between or planner.woven.transfers[step.key].index == max(
                t.index for t in planner.woven.transfers.values() if t.half == 0
            )


def test_every_order_starts_once_and_waits_once(split):
    p = pieces_of_split(split)
    for order in (sequential_order(p), Planner(split, wg.RATES, always=True).decide(64).order):
        steps = turns(p, order)
        assert sorted(s.key for s in steps if s.what == START) == sorted(p.transfers)
        assert sorted(s.key for s in steps if s.what == WAIT) == sorted(p.transfers)
        assert sorted(s.key for s in steps if s.what == SEGMENT) == sorted(p.segments)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4])
def test_most_of_the_communication_is_hidden(split, share):
    decision = Planner(split, _slow_link(split, share)).decide(512)
    assert decision.woven is not None
    exposed = decision.woven_seconds - decision.plain_seconds * (1 - share)
    assert exposed <= 0.55 * share * decision.plain_seconds  # of two layers: the last transfer is an eighth


def test_a_link_that_only_has_latency_is_not_woven_for(split):
    """Negative control: twice as many messages cost twice the latency, and hide none of it."""
    planner = _planner(split, latency=1e-3, link=1e30)
    assert not any(planner.decide(n).weaves for n in (1, 2, 16, 256, 1024))


def test_too_little_communication_is_not_worth_it(split):
    assert not Planner(split, _slow_link(split, 0.01)).decide(512).weaves


def test_a_transfer_that_takes_the_whole_processor_hides_nothing(split):
    """Negative control: the same link, its work done by the processor; and half of it in between."""
    rates = _slow_link(split)
    free, half, all_of_it = (
        Planner(split, dataclasses.replace(rates, taken=taken)).decide(512) for taken in (0.0, 0.5, 1.0)
    )
    assert free.weaves
    assert not all_of_it.weaves
    assert free.woven_seconds < half.woven_seconds < all_of_it.woven_seconds
    assert all_of_it.woven_seconds >= all_of_it.plain_seconds
    assert free.plain_seconds == half.plain_seconds  # an unwoven step waits anyway
    assert half.woven.hidden < free.woven.hidden


@pytest.mark.parametrize("taken", [0.0, 0.25, 1.0])
def test_a_segment_beside_transfers_is_slowed(taken):
    """Transfers from 1 to 3 and from 5 to 6 s, a segment of 4 s of work from 0 s."""
    end = weave_plan._slowed(0.0, 4.0, deque([(1.0, 3.0), (5.0, 6.0)]), taken)
    assert end == {0.0: 4.0, 0.25: 4.5, 1.0: 7.0}[taken]


def test_weights_that_are_read_twice_are_counted(split):
    """A few tokens: a half takes as long as the whole, because it reads the weights."""
    rates = dataclasses.replace(_slow_link(split), bandwidth=1e6)
    assert not Planner(split, rates).decide(2).weaves


def test_what_is_woven_is_predicted_to_gain(split):
    planner = Planner(split, _slow_link(split))
    for n in (1, 2, 3, 7, 64, 511, 4096):
        decision = planner.decide(n)
        if decision.weaves:
            assert 0 < decision.tokens_0 < n
            assert decision.woven_seconds <= (1 - MARGIN) * decision.plain_seconds


def test_one_token_is_never_cut(split):
    decision = Planner(split, wg.RATES, always=True).decide(1)
    assert not decision.weaves
    assert decision.woven_seconds == math.inf
    assert Planner(split, wg.RATES, always=True).decide(2).tokens_0 == 1


def test_the_cut_follows_the_waves_of_the_gpu(split):
    """With tiles of 128 rows, halves of 192 need the waves of 256 each: one of 256 and one of 128 do not."""
    rates = dataclasses.replace(_slow_link(split), units=4, tile_m=128, tile_n=32)
    planner = Planner(split, rates)
    assert planner.candidates(384)[0] == 192
    assert {128, 256} <= set(planner.candidates(384))
    decision = Planner(split, rates, always=True).decide(384)
    assert decision.tokens_0 % 128 == 0


def test_decisions_are_functions_of_the_number_of_tokens(split):
    first, second = (Planner(split, _slow_link(split)) for _ in range(2))
    assert first.hash == second.hash
    for n in (5, 64, 512, 1000):
        assert first.decide(n) == second.decide(n)


def test_the_critical_path_is_the_longest(split):
    planner = Planner(split, _slow_link(split))
    seconds = planner.woven_seconds(512, 256)
    dag = planner.woven_dag
    path, left = critical_path(dag, seconds)
    assert nx.is_path(dag, path)
    assert sum(seconds[k] for k in path) == pytest.approx(left[path[0]])
    weighted = nx.DiGraph((a, b, {"w": seconds[b]}) for a, b in dag.edges)
    assert nx.dag_longest_path_length(weighted, "w") <= left[path[0]] + 1e-12
    assert schedule(planner.woven, dag, seconds).seconds >= left[path[0]] - 1e-12


def test_a_schedule_respects_the_edges_and_the_resources(split):
    planner = Planner(split, _slow_link(split))
    found = planner.decide(512).woven
    assert found is not None
    at = {e.key: e for e in found.events}
    assert all(at[a].end <= at[b].begin + 1e-15 for a, b in planner.woven.edges)
    for resource in {e.resource for e in found.events}:
        ordered = sorted((e for e in found.events if e.resource == resource), key=lambda e: e.begin)
        assert all(x.end <= y.begin + 1e-15 for x, y in itertools.pairwise(ordered))


def test_costs_are_expressions_in_the_number_of_tokens(split):
    planner = Planner(split, wg.RATES)
    assert all(cost.free_symbols <= {N, *cost.free_symbols} for cost in planner.woven_cost.values())
    assert any(N in cost.free_symbols for cost in planner.woven_cost.values())
    transfer = next(planner.woven_cost[k] for k, t in planner.woven.transfers.items() if t.half == 0)
    assert float(transfer.subs(N, 100)) == pytest.approx(1e-6 + 100 * wg.HIDDEN * 4 / 1e9)


def test_rates_of_a_target():
    h100 = from_table("NVIDIA H100 80GB HBM3").measured({"link_latency": Value(1e-5, "measured: test")})
    rates = Rates.of(h100)
    assert (rates.units, rates.tile_m, rates.link) == (132, 128, 450e9)
    with pytest.raises(UnknownDeviceError, match="fp32_flops"):
        Rates.of(Device("cpu", "x", "x86_64"))


def test_the_woven_graph_is_the_divided_graph_in_another_order(split):
    decision = Planner(split, _slow_link(split)).decide(512)
    woven, sequential = (
        token_weave(split, decision),
        in_order(split, sequential_order(pieces_of_split(split))),
    )
    assert len(woven.graph.nodes) == len(sequential.graph.nodes) == len(split.gm.graph.nodes)
    assert [n.name for n in woven.graph.nodes] != [n.name for n in sequential.graph.nodes]
    with wg.group():
        x = wg.Graph(wg.model(2), wg.tokens(12), 1).arguments(wg.tokens(9))
        (a,), (b,) = wg.run_halves(woven, x, 4), wg.run_halves(sequential, x, 4)
    assert a.equal(b)


def test_the_plan_explains_itself(split):
    text = describe_plan(Planner(split, _slow_link(split)), (1, 512))
    assert "4 of 4 collectives divided" in text
    assert "critical path of 512 tokens" in text
    assert "ms" in text
    assert "█" in text
    assert "░" in text


def test_drawings(split):
    p = pieces_of_split(split)
    dot, mermaid = to_dot(p), to_mermaid(p)
    assert dot.count("->") == mermaid.count("-->") == len(p.edges)
    assert dot.startswith("digraph")
    assert mermaid.startswith("flowchart")
    dag_of(p)
