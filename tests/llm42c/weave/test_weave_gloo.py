"""Woven graphs on real Gloo ranks: the bits of the unwoven graph, on every rank, and one plan for all."""

from __future__ import annotations

from typing import Any

import pytest
import rank_world
import torch
import torch.distributed as dist

from llm42c.errors import RanksDifferError

SIZES = (1, 2, 7, 24)


def _packed(rank: int) -> dict[str, Any]:
    """The engine's graph: fused collectives inside operators, so they run in a lane."""
    import tiny
    import tp_families

    from llm42c.capture.dynamo import capture_packed
    from llm42c.compile.weights import WeightStore
    from llm42c.parallel.ranks import Ranks
    from llm42c.parallel.tensor_parallel import divide
    from llm42c.passes import pipeline
    from llm42c.passes.base import PACKED, Context
    from llm42c.weave.captured import compile_woven

    size = dist.get_world_size()
    config = tp_families.CONFIGS["llama"]
    model = tp_families.model("llama", torch.float32)
    assert config().num_attention_heads % size == 0
    divide(model, Ranks(rank, size, dist.group.WORLD.group_name))
    captured = capture_packed(model)
    pipeline.run(captured.gm, Context(target=PACKED))
    WeightStore(model).materialise(captured.gm)
    program = compile_woven(captured.gm, when="always", style="fixed", group=dist.group.WORLD)
    out: dict[str, Any] = {"hash": program.planner.hash, "unlike": _unlike(rank, captured.gm, program)}
    with torch.no_grad():
        for tokens in SIZES:
            for when in ("always", "off"):
                program.when = when
                arguments = tiny.packed_arguments(captured, tiny.ids(tokens) % 96, torch.float32)
                (logits,) = program(*arguments)
                caches = [a for a in arguments if isinstance(a, torch.Tensor) and a.dim() == 4]
                out[f"{when} {tokens}"] = [logits, *caches]
    out["calls"] = program.calls
    return out


def _functional(rank: int) -> dict[str, Any]:
    """What Hugging Face's own division compiles to: collectives that torch runs asynchronously."""
    from torch import nn

    from llm42c.weave.captured import WovenProgram, weaving_backend

    torch.manual_seed(rank)
    weights = nn.ParameterList([nn.Parameter(torch.randn(16, 16) / 4) for _ in range(4)])
    made: list[WovenProgram] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        for w in weights:
            x = x + torch.ops._c10d_functional.wait_tensor(
                torch.ops._c10d_functional.all_reduce(torch.tanh(x) @ w, "sum", dist.group.WORLD.group_name)
            )
        return x

    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(5))
    torch._dynamo.mark_dynamic(x, 1)
    backend = weaving_backend(when="always", style="eager", group=dist.group.WORLD, made=made)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        return {"woven": compiled(x), "eager": model(x), "calls": made[0].calls}


def _unlike(rank: int, gm: Any, program: Any) -> list[str]:
    """What ranks say that see another link, another graph or another plan than rank 0."""
    from llm42c.codegen.device import Device, Value
    from llm42c.passes.weave.rules import UnsplittableError
    from llm42c.weave.captured import plan, require_equal

    names = ("fp32_flops", "memory_bandwidth", "link_latency", "link_bandwidth")
    values = {n: Value(1e9 if rank else 2e9, "test") for n in names}
    other = Device("cpu", "test", "x86_64", values)
    empty = torch.fx.symbolic_trace(torch.nn.Identity())
    attempts = (
        lambda: plan(gm, other, group=dist.group.WORLD),
        lambda: plan(empty if rank else gm, group=dist.group.WORLD),
        lambda: require_equal(program.planner.hash[rank:], dist.group.WORLD),
    )
    said = []
    for attempt in attempts:
        try:
            attempt()
        except (RanksDifferError, UnsplittableError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.mark.slow
def test_functional_collectives_of_four_ranks_agree_and_are_near_eager():
    ranks = rank_world.run(4, _functional)
    for out in ranks:
        assert torch.allclose(out["woven"], out["eager"], rtol=1e-5, atol=1e-6)
        assert out["calls"]["woven"] == 1
        assert torch.equal(out["woven"], ranks[0]["woven"])


@pytest.mark.slow
def test_woven_ranks_give_the_bits_of_unwoven_ones():
    ranks = rank_world.run(2, _packed)
    assert len({out["hash"] for out in ranks}) == 1
    for out in ranks:
        rates, graph, order = out["unlike"]
        assert "the division of tokens of rank 1 is not that of rank 0: rates" in rates
        assert "the division of tokens of rank 1 is not that of rank 0: no collective in the graph" in graph
        assert "the weaving plan of rank 1 is not that of rank 0" in order
        assert all(said.startswith("RanksDifferError") for said in out["unlike"])
    for out in ranks:
        assert out["calls"] == {"woven": len(SIZES) - 1, "whole": len(SIZES) + 1}
        for tokens in SIZES:
            for woven, whole in zip(out[f"always {tokens}"], out[f"off {tokens}"], strict=True):
                assert torch.equal(woven.view(torch.uint8), whole.view(torch.uint8))
            assert torch.equal(out[f"always {tokens}"][0], ranks[0][f"always {tokens}"][0])
