"""Programs of divided graphs: compiled segments, shared by layers and halves, and chosen by the tokens."""

from __future__ import annotations

import threading

import pytest
import torch
import weave_graphs as wg

from llm42c.codegen.device import Device, Value
from llm42c.passes.weave.schedule import Planner
from llm42c.passes.weave.split import split_tokens
from llm42c.weave.captured import WovenProgram, compile_woven, require_equal, weaving_backend
from llm42c.weave.runner import SameThread, ThreadLane

BOUND = 400 * torch.finfo(torch.float32).eps  # as in tests/passes/weave/test_token_split.py


@pytest.fixture(scope="module")
def graph():
    with wg.group():
        yield wg.Graph(wg.model(4), wg.tokens(12), 1)


@pytest.mark.slow
def test_compiled_segments_compute_the_graph(graph):
    program = WovenProgram(Planner(split_tokens(graph.gm), wg.RATES, always=True), "free", SameThread())
    with torch.no_grad():
        for count in (1, 2, 3, 40):
            x = graph.arguments(wg.tokens(count))
            (got,) = program(*x)
            (whole,) = graph.gm(*x)
            assert (got - whole).abs().max() <= BOUND * whole.abs().max()
    assert program.calls == {"woven": 3, "whole": 1}


def test_layers_and_halves_share_what_is_compiled(graph):
    program = WovenProgram(Planner(split_tokens(graph.gm), wg.RATES, always=True), "eager", SameThread())
    with torch.no_grad():
        program(*graph.arguments(wg.tokens(40)))
    assert sum(program.compiler.calls.values()) > 2 * len(program.compiler.compiled)
    assert "all_reduce" in program.sources["woven_0"]


def test_when_may_be_changed_between_calls(graph):
    program = WovenProgram(Planner(split_tokens(graph.gm), wg.RATES), "eager", SameThread())
    x = graph.arguments(wg.tokens(9))
    for when in ("always", "off"):
        program.when = when
        program(*x)
    assert program.calls == {"woven": 1, "whole": 1}


def test_a_thread_lane_runs_in_order():
    lane, seen = ThreadLane(), []
    hold = threading.Event()

    def first() -> int:
        hold.wait(5)
        seen.append(1)
        return 1

    a = lane.start(first)
    b = lane.start(lambda: seen.append(2) or 2)
    assert not seen
    hold.set()
    assert (lane.wait(b), lane.wait(a)) == (2, 1)
    assert seen == [1, 2]


def test_an_error_in_a_lane_reaches_who_waits():
    def fail() -> None:
        raise RuntimeError("the link is cut")

    lane = ThreadLane()
    begun = lane.start(fail)
    with pytest.raises(RuntimeError, match="the link is cut"):
        lane.wait(begun)


def _target() -> Device:
    numbers = {
        "fp32_flops": 1e11,
        "memory_bandwidth": 1e10,
        "link_latency": 1e-6,
        "link_bandwidth": 1e9,
    }
    return Device("cpu", "test", "x86_64", {n: Value(v, "test") for n, v in numbers.items()})


def test_the_backend_weaves_or_leaves_the_graph_to_inductor(graph):
    made: list[WovenProgram] = []
    torch._dynamo.reset()
    model, x = wg.model(1), wg.tokens(12)
    torch._dynamo.mark_dynamic(x, 1)
    backend = weaving_backend(_target(), when="always", style="eager", made=made)
    with wg.group(), torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert (compiled(x) - model(x)).abs().max() <= BOUND * model(x).abs().max()
    assert made[0].calls["woven"] == 1
    assert compile_woven(graph.gm, _target()).when == "auto"


def test_one_rank_has_nothing_to_compare():
    require_equal("anything", None)
