"""Every family with a tensor-parallel plan, divided by it: fused wherever it can be, and woven without
changing a bit.

The graphs are the engine's: packed batches over paged KV, every operator of a fixed order. The other rank is
a simulated one that holds the same bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import tp_families
from torch import fx

from llm42c.capture.dynamo import CapturedGraph, capture_packed
from llm42c.compile.weights import WeightStore
from llm42c.parallel.ranks import Ranks
from llm42c.parallel.tensor_parallel import divide
from llm42c.passes import graph as g
from llm42c.passes import pipeline
from llm42c.passes.base import PACKED, Context, Report
from llm42c.passes.weave import communication as comm
from llm42c.passes.weave.cost import Rates
from llm42c.passes.weave.schedule import Planner
from llm42c.passes.weave.split import Split, split_tokens
from llm42c.weave.captured import WovenProgram
from llm42c.weave.runner import ThreadLane
from llm42c.weave.simulated_link import Link, VirtualClock, simulated

GROUP = "families"
RATES = Rates(flops=1e11, bandwidth=1e10, latency=1e-6, link=1e9, call=0.0, units=1, tile_m=1, tile_n=1)


DTYPE = torch.bfloat16  # with the casts that norms and sums have there


def _captured(family: str) -> tuple[CapturedGraph, Report, Split]:
    model = tp_families.model(family, DTYPE)
    assert not divide(model, Ranks(0, 2, GROUP)).whole
    captured = capture_packed(model)
    report = pipeline.run(captured.gm, Context(target=PACKED))
    WeightStore(model).materialise(captured.gm)
    return captured, report, split_tokens(captured.gm)


def _arguments(captured: CapturedGraph, tokens: int) -> list[Any]:
    return tiny.packed_arguments(captured, tiny.ids(tokens) % 96, DTYPE)


def _check_sites(captured: CapturedGraph, report: Report, family: str) -> None:
    """Two sites a layer, all of them fused or each with its reason."""
    calls = [g.name(n).removeprefix("llm42::") for n in captured.gm.graph.nodes]
    fused, sites = report["allreduce_rmsnorm"], 2 * tp_families.LAYERS
    if family in tp_families.FUSED:
        assert len(fused.matches) == calls.count("all_reduce_add_rms_norm") == sites
        assert not fused.misses
    else:
        assert not fused.matches
        assert len(fused.misses) == calls.count("all_reduce") == sites
        assert all(tp_families.REASONS[family] in miss.reason for miss in fused.misses)
    assert not report.unplaced
    gathers = {"phi3": 1 + 2 * tp_families.LAYERS, "olmo2": 1 + 3 * tp_families.LAYERS}
    assert calls.count("all_gather_last") == gathers.get(family, 1)  # 1: the logits


def _bits(values: list[Any]) -> list[torch.Tensor]:
    return [v.contiguous().view(torch.uint8) for v in values if isinstance(v, torch.Tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("family", tp_families.CONFIGS)
def test_every_family_is_fused_and_woven_without_changing_a_bit(family: str):
    with simulated(GROUP, Link(0.0, 1e12, VirtualClock())), torch.no_grad():
        captured, report, split = _captured(family)
        _check_sites(captured, report, family)
        collectives = [n for n in split.original.graph.nodes if comm.is_collective(n)]
        late = [n for n in collectives if "all_gather_last" in g.called(n)][-1:]  # the logits
        assert split.collectives >= len(collectives) - len(late)
        assert len(split.ordered) == tp_families.LAYERS
        # Eager GELU rounds the tail of a vector of 16 in its own way: Gemma's rows of 24 in pairs.
        cuts = ((4, 2), (24, 16), (24, 10)) if family.startswith("gemma") else ((2, 1), (11, 5), (23, 16))
        for tokens, cut in cuts:
            whole, halves = _arguments(captured, tokens), _arguments(captured, tokens)
            (a,) = fx.Interpreter(split.original).run(*whole)
            (b,) = fx.Interpreter(split.gm).run(*halves, cut)
            for x, y in zip(_bits([a, *whole]), _bits([b, *halves]), strict=True):
                assert torch.equal(x, y)  # logits, and what was written into the caches


@pytest.mark.slow
def test_a_compiled_program_weaves_in_its_own_thread():
    """Fused collectives return when they are done: a lane makes them concurrent. Bits as unwoven."""
    with simulated(GROUP, Link(0.0, 1e12, VirtualClock())), torch.no_grad():
        captured, _, split = _captured("llama")
        program = WovenProgram(Planner(split, RATES), "fixed", ThreadLane())
        for tokens in (1, 2, 9, 24):
            seen = []
            for when in ("always", "off"):
                program.when = when
                arguments = _arguments(captured, tokens)
                seen.append(_bits([*program(*arguments), *arguments]))
            assert all(torch.equal(x, y) for x, y in zip(*seen, strict=True))
        assert program.calls == {"woven": 3, "whole": 5}
