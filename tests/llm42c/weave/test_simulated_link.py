"""The simulated link, and the order of events on it: nothing here depends on wall time."""

from __future__ import annotations

import pytest
import torch
import weave_graphs as wg

from llm42c.passes.weave.program import sequential_order
from llm42c.passes.weave.schedule import Planner
from llm42c.passes.weave.split import split_tokens
from llm42c.weave.runner import SameThread, build_program
from llm42c.weave.simulated_link import Link, VirtualClock, WallClock

SECONDS_A_TOKEN = 1e-3


class _Virtual:
    """Compiles a segment to its own calls, which take virtual time by their number of tokens."""

    def __init__(self, link: Link) -> None:
        self.link, self.busy = link, 0.0

    def __call__(self, module):
        def run(*args):
            rows = next((a.shape[1] for a in args if isinstance(a, torch.Tensor) and a.dim() == 3), 0)
            self.link.clock.advance(SECONDS_A_TOKEN * rows)
            self.busy += SECONDS_A_TOKEN * rows
            self.link.log.append(("compute", rows))
            return module.forward(*args)

        return run


def _run(latency: float, bandwidth: float, woven: bool, tokens: int = 64):
    """(link, seconds, seconds of compute) of a run in virtual time."""
    with wg.group(latency, bandwidth) as link:
        graph = wg.Graph(wg.model(2), wg.tokens(12), 1)
        split = split_tokens(graph.gm)
        planner = Planner(split, wg.RATES, always=True)
        compiler = _Virtual(link)
        order = planner.decide(tokens).order if woven else sequential_order(planner.woven)
        program, _ = build_program(split.gm, planner.woven, order, compiler, SameThread())
        link.clear()
        link.clock.time = 0.0
        with torch.no_grad():
            program(*graph.arguments(wg.tokens(tokens)), tokens // 2)
        return link, link.clock.now(), compiler.busy


def test_one_transfer_at_a_time():
    clock = VirtualClock()
    link = Link(1.0, 10.0, clock)
    first, second = link.send(10), link.send(20)
    assert (first.begin, first.end) == (0.0, 2.0)
    assert (second.begin, second.end) == (2.0, 5.0)
    link.receive(first)
    assert clock.now() == 2.0
    clock.advance(10.0)
    link.receive(second)
    assert clock.now() == 12.0
    assert link.log == [("start", 0), ("start", 1), ("wait", 0), ("wait", 1)]
    assert link.seconds == 5.0


def test_a_wall_clock_moves_on():
    clock = WallClock()
    begin = clock.now()
    clock.sleep_until(begin + 1e-3)
    assert clock.now() >= begin + 1e-3


def test_collectives_go_over_the_link():
    with wg.group(1.0, 4.0) as link:
        x = torch.ones(3, 2)
        assert wg.all_reduce(x).equal(x)
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(x, 2, wg.GROUP)
        assert torch.ops._c10d_functional.wait_tensor(gathered).equal(torch.ones(6, 2))
        assert [t.nbytes for t in link.transfers] == [24, 24]


def test_the_other_half_computes_while_a_transfer_is_under_way():
    link, _, _ = _run(0.0, 4e5, woven=True)
    starts = [i for i, (what, _) in enumerate(link.log) if what == "start"]
    under_way = 0
    for i in starts:
        end = link.log.index(("wait", link.log[i][1]))
        under_way += any(what == "compute" for what, _ in link.log[i:end])
    assert len(starts) == 8
    assert under_way >= 7  # nothing is left to compute beside the last


def test_sequential_halves_hide_nothing():
    """Control: the same segments and transfers, half after half."""
    link, seconds, busy = _run(0.0, 4e5, woven=False)
    assert seconds == pytest.approx(busy + link.seconds)


def test_woven_halves_hide_three_quarters():
    link, seconds, busy = _run(0.0, 4e5, woven=True)
    assert seconds - busy <= 0.25 * link.seconds


def test_the_log_is_the_same_in_every_run():
    assert _run(1e-4, 1e6, woven=True)[0].log == _run(1e-4, 1e6, woven=True)[0].log
