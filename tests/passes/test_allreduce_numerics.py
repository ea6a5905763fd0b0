"""Rewritten graphs on real Gloo ranks: fusing, and dividing the residual, change no bit."""

from __future__ import annotations

from typing import Any

import pytest
import rank_world
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

K, H, SITES = 24, 32, 3
ROWS = ((1, 1), (1, 3), (2, 7))  # B, S: fewer rows than ranks, and numbers that ranks do not divide


def rms(h: Tensor, w: Tensor) -> Tensor:
    wide = h.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)


def block(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A chain of sites; x: [B, S, K] of this rank, w_o: [H, K] of this rank, r: [B, S, H], w: [H]."""
    for _ in range(SITES):
        y = F.linear(x, w_o)
        dist.all_reduce(y)
        r = r + y
        y = rms(r, w)
        x = torch.tanh(y[..., :K] + x)
    return y, r


def work(rank: int) -> dict[Any, Any]:
    """Results and calls of the graph after more and more passes, by (rows, which)."""
    import graphs

    from llm42c.passes.add_rms_norm import add_rms_norm
    from llm42c.passes.allreduce_rmsnorm import allreduce_rmsnorm
    from llm42c.passes.base import Context, PassReport
    from llm42c.passes.cleanup import erase_dead_code
    from llm42c.passes.collectives import collectives
    from llm42c.passes.linear import linear
    from llm42c.passes.normalize import normalize
    from llm42c.passes.residual_shards import residual_shards
    from llm42c.passes.rms_norm import rms_norm

    forms = {
        "unfused": [collectives, normalize, rms_norm, add_rms_norm, linear],
        "fused": [allreduce_rmsnorm],
        "divided": [residual_shards],
    }
    ctx = Context(residual_shards=True)
    out: dict[Any, Any] = {}
    for rows in ROWS:
        shared = torch.Generator().manual_seed(1)
        own = torch.Generator().manual_seed(10 + rank)
        inputs = (
            torch.randn(*rows, K, generator=own).bfloat16(),
            torch.randn(H, K, generator=own).bfloat16(),
            torch.randn(*rows, H, generator=shared).bfloat16(),
            torch.randn(H, generator=shared).bfloat16(),
        )
        gm = graphs.capture(block, *inputs)
        for name, steps in forms.items():
            for step in steps:
                step(gm.graph, ctx, PassReport(step.__name__))
                erase_dead_code(gm.graph)
            gm.recompile()
            out[rows, name] = graphs.run(gm), graphs.calls(gm)
    return out


def bits(results: Any) -> list[Tensor]:
    return [t.contiguous().view(torch.uint8) for t in results]


@pytest.mark.slow
def test_fused_and_divided_graphs_have_the_bits_of_the_unfused():
    results = rank_world.run(3, work)
    for out in results:
        for rows in ROWS:
            unfused, calls = out[rows, "unfused"]
            assert calls["llm42::all_reduce"] == SITES
            assert out[rows, "fused"][1]["llm42::all_reduce_add_rms_norm"] == SITES
            assert out[rows, "divided"][1]["llm42::all_reduce_add_rms_norm_sharded"] == SITES
            for name in ("fused", "divided"):
                pairs = zip(bits(unfused), bits(out[rows, name][0]), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), (rows, name)
            first = bits(results[0][rows, "unfused"][0])
            assert all(torch.equal(a, b) for a, b in zip(first, bits(unfused), strict=True))
            assert bool(unfused[0].abs().sum() > 0)
