"""Torch's attention of packed sequences: each case against the graph before, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import apply, calls, capture, run, same_bits
from paged_world import Heads, Runner, World
from torch import Tensor, fx

from llm42c.passes import varlen_attention as p


def paged(*args: Any) -> Tensor:
    return torch.ops.llm42.paged_attention(*args)


# Torch's operator computes on GPUs only; here it is captured, never run.

LENGTHS = [7, 20, 1]


def captured(fn: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    pytest.importorskip("torch.nn.attention.varlen")
    return capture(fn, *inputs, runs=False)


def own_tokens(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    return torch.ops.torch_attn._varlen_attn(q, k, v, cu, cu, 20, 20, True)[0]


def sliding(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    return torch.ops.torch_attn._varlen_attn(q, k, v, cu, cu, 20, 20, False, None, [5, 0])[0]


def with_log_sum_exp(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Any:
    y, lse, _ = torch.ops.torch_attn._varlen_attn(q, k, v, cu, cu, 20, 20, True)
    return y + lse.sum()


def not_causal(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    return torch.ops.torch_attn._varlen_attn(q, k, v, cu, cu, 20, 20, False)[0]


def packed_rows() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(28, h, 64, generator=g) for h in (4, 2, 2))
    return [q, k, v, torch.tensor([0, 7, 27, 28], dtype=torch.int32)]


def sdpa_by_sequence(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, window: int = 0) -> Tensor:
    parts = []
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        heads = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        i = torch.arange(end - begin)
        seen = i <= i[:, None]
        if window:
            seen &= i > i[:, None] - window
        y = F.scaled_dot_product_attention(*heads, seen, enable_gqa=True)
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize(("fn", "window"), [(own_tokens, 0), (sliding, 6)])
def test_varlen_over_its_own_tokens(fn: Any, window: int):
    inputs = packed_rows()
    gm = captured(fn, *inputs)
    report = apply(gm, p.varlen_attention)
    assert len(report.matches) == 1
    assert calls(gm)["llm42::varlen_attention"] == 1
    torch.testing.assert_close(run(gm), sdpa_by_sequence(*inputs, window=window), rtol=0, atol=1e-5)


def test_varlen_over_pages_has_the_bits_of_paged_attention():
    """The cache [pages, page, Hkv, D] is read where it is."""
    runner = Runner(World.make([40, 300, 20], Heads(4, 2)), page=32)
    runner.call([(0, 39), (1, 260)])
    args = runner.arguments([(0, 1), (1, 40), (2, 20)])
    want = paged(*args)
    k, v = runner.k_cache.permute(0, 3, 1, 2).contiguous(), runner.v_cache.transpose(1, 2).contiguous()
    cu, lens, table = args[6], args[7], args[8].clamp(min=0)

    def decode(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, lens: Tensor, table: Tensor) -> Tensor:
        return torch.ops.torch_attn._varlen_attn(
            q, k, v, cu, None, 40, 320, True, 0.125, None, True, lens, table
        )[0]

    gm = captured(decode, args[0], k, v, cu, lens, table)
    report = apply(gm, p.varlen_attention)
    assert len(report.matches) == 1
    assert same_bits(run(gm), want)


def test_varlen_over_pages_of_another_size_stays():
    q, k, _, cu = packed_rows()
    table = torch.zeros(3, 4, dtype=torch.int32)
    pool = k.new_zeros(9, 8, 2, 64)

    def decode(q: Tensor, pool: Tensor, cu: Tensor, lens: Tensor, table: Tensor) -> Tensor:
        return torch.ops.torch_attn._varlen_attn(
            q, pool, pool, cu, None, 20, 32, True, None, None, True, lens, table
        )[0]

    report = apply(captured(decode, q, pool, cu, cu[1:], table), p.varlen_attention)
    assert report.misses[0].reason == "pages of 8 tokens"


@pytest.mark.parametrize(
    ("fn", "reason"), [(with_log_sum_exp, "the log-sum-exp is used"), (not_causal, "not causal")]
)
def test_varlen_that_means_something_else_stays(fn: Any, reason: str):
    report = apply(captured(fn, *packed_rows()), p.varlen_attention)
    assert not report.matches
    assert report.misses[0].reason == reason
