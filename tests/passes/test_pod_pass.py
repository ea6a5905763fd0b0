"""The pass that makes hybrid attention: each case against the graph before, and its refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import apply, calls, capture, run
from torch import Tensor

from llm42c.passes import pod_attention as p

sys.path.append(str(Path(__file__).parents[1] / "codegen"))
from paged_world import Heads, Runner, World


def on_cpu(graph: Any, ctx: Any, report: Any) -> None:
    p.rewrite(graph, ctx, report, devices=("cpu",), copies=True)


def paged(*args: Any) -> Tensor:
    return torch.ops.llm42.paged_attention(*args)


def test_paged_attention_becomes_pod_with_the_same_bits():
    world = World.make([20, 9], Heads(q=4, kv=2, dtype=torch.float32))
    args = Runner(world).arguments([(0, 20), (1, 9)])
    gm = capture(paged, *args)
    before = run(gm)
    report = apply(gm, on_cpu)
    assert len(report.matches) == 1
    assert any("pod_attention" in name for name in calls(gm))
    assert torch.equal(run(gm), before)


def test_on_a_cpu_paged_attention_stays_and_says_why():
    args = Runner(World.make([5], Heads(q=2, kv=1))).arguments([(0, 5)])
    report = apply(capture(paged, *args), p.pod_attention)
    assert not report.matches
    assert "schedules prefills and decodes itself" in report.misses[0].reason


def split_batch(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Any:
    a = F.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True, enable_gqa=True)
    b = F.scaled_dot_product_attention(q_d, k_d, v_d, enable_gqa=True)
    return a, b


def operands() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 19, 64), (1, 2, 19, 64), (1, 2, 19, 64), (3, 4, 1, 64), (3, 2, 37, 64), (3, 2, 37, 64)]
    return [torch.randn(*s, generator=g) for s in shapes]


def test_two_independent_sdpa_calls_become_one():
    gm = capture(split_batch, *operands())
    before = run(gm)
    report = apply(gm, on_cpu)
    assert len(report.matches) == 1
    assert calls(gm)["sdpa"] == 0
    for new, old in zip(run(gm), before, strict=True):
        # n·eps of both computations, scores of size about 1 and values up to 5
        torch.testing.assert_close(new, old, rtol=0, atol=2 * (64 + 37) * 1.2e-7 * 5)


def test_sdpa_calls_that_depend_on_each_other_stay():
    def chained(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Tensor:
        a = F.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True, enable_gqa=True)
        return F.scaled_dot_product_attention(q_d + a[:, :, :1], k_d, v_d, enable_gqa=True)

    report = apply(capture(chained, *operands()), on_cpu)
    assert not report.matches
    assert "depend on each other" in report.misses[0].reason


def test_copies_are_made_on_request_only():
    report = apply(capture(split_batch, *operands()), p.pod_attention)
    assert not report.matches
    assert report.misses[0].reason == "not on a GPU"


def test_varlen_through_pages_is_attention_of_each_sequence():
    torch.manual_seed(0)
    lengths, heads = [7, 20, 1], (4, 2)
    q, k, v = (torch.randn(sum(lengths) + 2, h, 64) for h in (heads[0], heads[1], heads[1]))
    cu = torch.tensor([0, 7, 27, 28], dtype=torch.int32)
    y = p.varlen_through_pages(q, k, v, cu, 20, 0.125, 0)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        part = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        want = F.scaled_dot_product_attention(*part, is_causal=True, scale=0.125, enable_gqa=True)
        torch.testing.assert_close(y[begin:end].transpose(0, 1)[None], want, rtol=0, atol=1e-5)
    assert not y[28:].any()


def varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    import torch.nn.attention.varlen

    return torch.ops.torch_attn._varlen_attn(q, k, v, cu, cu, 20, 20, True)[0]


def test_varlen_call_is_rewritten():
    pytest.importorskip("torch.nn.attention.varlen")
    q, k, v = torch.randn(28, 4, 64), torch.randn(28, 4, 64), torch.randn(28, 4, 64)
    cu = torch.tensor([0, 7, 27, 28], dtype=torch.int32)
    caught: list[Any] = []

    def grab(gm: Any, inputs: list[Any]) -> Any:  # the call itself exists on GPUs only
        gm.meta["inputs"] = list(inputs)
        caught.append(gm)
        return lambda *_: (torch.zeros_like(q),)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(varlen, backend=grab, fullgraph=True, dynamic=False)(q, k, v, cu)
    report = apply(caught[0], on_cpu)
    assert len(report.matches) == 1
    assert torch.equal(run(caught[0]), p.varlen_through_pages(q, k, v, cu, 20, 0.125, 0))
