"""The pass that makes hybrid attention: each case against the graph before, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import apply, calls, capture, run, same_bits
from paged_world import Heads, Runner, World
from torch import Tensor, fx

from llm42c.passes import pod_attention as p
from llm42c.passes.attention_sdpa import attention_sdpa
from llm42c.passes.base import Context


def paged(*args: Any) -> Tensor:
    return torch.ops.llm42.paged_attention(*args)


def pod_calls(gm: fx.GraphModule) -> list[str]:
    return [name for name in calls(gm) if "llm42::pod_" in name]


def test_paged_attention_becomes_pod_with_the_same_bits():
    world = World.make([20, 9], Heads(q=4, kv=2, dtype=torch.float32))
    args = Runner(world).arguments([(0, 20), (1, 9)])
    gm = capture(paged, *args)
    before = run(gm)
    report = apply(gm, p.pod_attention, ctx=Context(decode_workers=3))
    assert len(report.matches) == 1
    assert pod_calls(gm) == ["llm42::pod_attention"]
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.llm42.pod_attention.default)
    assert node.args[-1] == 3
    assert same_bits(run(gm), before)


# Case 3: engines that split a batch.


def split_batch(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Any:
    a = F.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True, enable_gqa=True)
    b = F.scaled_dot_product_attention(q_d, k_d, v_d, enable_gqa=True)
    return a, b


def decode_first(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Any:
    b = F.scaled_dot_product_attention(q_d, k_d, v_d, enable_gqa=True)
    a = F.scaled_dot_product_attention(q_p * 2, k_p, v_p, is_causal=True, enable_gqa=True)
    return b * 3, a


def with_mask(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Any:
    seen = torch.arange(37, device=q_d.device)[None, None, None] < 30
    a = F.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True, enable_gqa=True)
    b = F.scaled_dot_product_attention(q_d, k_d, v_d, seen, enable_gqa=True, scale=0.3)
    return a, b


def two_layers(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Any:
    for _ in range(2):
        q_p, q_d = split_batch(q_p, k_p, v_p, q_d, k_d, v_d)
    return q_p, q_d


def operands() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 19, 64), (1, 2, 19, 64), (1, 2, 19, 64), (3, 4, 1, 64), (3, 2, 37, 64), (3, 2, 37, 64)]
    return [torch.randn(*s, generator=g) for s in shapes]


@pytest.mark.parametrize(
    ("fn", "pairs"), [(split_batch, 1), (decode_first, 1), (with_mask, 1), (two_layers, 2)]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_two_independent_calls_become_one_with_the_same_bits(fn: Any, pairs: int, dynamic: bool):
    separate, together = (capture(fn, *operands(), dynamic=dynamic) for _ in range(2))
    apply(separate, attention_sdpa)
    report = apply(together, attention_sdpa, p.pod_attention, ctx=Context(decode_workers=1))
    assert len(report.matches) == pairs
    assert not report.misses
    assert calls(together)["llm42::dense_attention"] == 0
    assert calls(together)["llm42::pod_dense_attention"] == pairs
    for new, old in zip(run(together), run(separate), strict=True):
        assert same_bits(new, old)


def chained(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Tensor:
    a = F.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True, enable_gqa=True)
    return F.scaled_dot_product_attention(q_d + a[:, :, :1], k_d, v_d, enable_gqa=True)


def needed_first(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Any:
    a = F.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True, enable_gqa=True).relu()
    return a, F.scaled_dot_product_attention(q_d.relu(), k_d, v_d, enable_gqa=True)


def written_between(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Any:
    k, v = k_p.clone(), v_p.clone()
    a = F.scaled_dot_product_attention(q_p, k, v, is_causal=True, enable_gqa=True)
    k.zero_()
    return a, F.scaled_dot_product_attention(q_d * 2, k_d, v_d, enable_gqa=True)


def other_dtype(q_p: Tensor, k_p: Tensor, v_p: Tensor, q_d: Tensor, k_d: Tensor, v_d: Tensor) -> Any:
    decode = [x.bfloat16() for x in (q_d, k_d, v_d)]
    return split_batch(q_p, k_p, v_p, *decode)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (chained, "depend on each other"),
        (needed_first, "is used before the other's operands exist"),
        (written_between, "is written before the other call"),
        (other_dtype, "different dtypes"),
    ],
)
def test_calls_that_must_stay_apart_do(fn: Callable[..., Any], reason: str):
    gm = capture(fn, *operands())
    before = run(gm)
    report = apply(gm, attention_sdpa, p.pod_attention)
    assert not report.matches
    assert reason in report.misses[0].reason
    assert calls(gm)["llm42::dense_attention"] == 2
    for new, old in zip(run(gm), before, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=2e-2 if new.dtype == torch.bfloat16 else 1e-5)


def test_calls_that_will_be_differentiated_stay():
    report = apply(capture(split_batch, *operands()), attention_sdpa, p.pod_attention, ctx=Context(grad=True))
    assert report.misses[0].reason == "pod_dense_attention has no autograd formula"


def test_a_batch_of_prefills_only_is_no_miss():
    def prefills(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    report = apply(capture(prefills, *operands()[:3]), attention_sdpa, p.pod_attention)
    assert not report.matches
    assert not report.misses


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_backend_pairs_them(dynamic: bool):
    from llm42c.backend import rewrite_plain
    from llm42c.compile.dump import Dump
    from llm42c.options import Options

    gm = capture(split_batch, *operands(), dynamic=dynamic)
    report = rewrite_plain(gm, gm.meta["inputs"], Options(), Dump(None, "pair"))
    assert len(report["pod_attention"].matches) == 1
    assert not report.unplaced


# Case 2: torch's own operator, which computes on GPUs only; here it is captured, never run.

LENGTHS = [7, 20, 1]


def captured(fn: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    pytest.importorskip("torch.nn.attention.varlen")
    caught: list[Any] = []

    def grab(gm: Any, examples: list[Any]) -> Any:
        gm.meta["inputs"] = list(examples)
        caught.append(gm)
        return lambda *_: (torch.zeros_like(inputs[0]),)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=grab, fullgraph=True, dynamic=False)(*inputs)
    return caught[0]


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
    report = apply(gm, p.pod_attention)
    assert len(report.matches) == 1
    assert pod_calls(gm) == ["llm42::pod_varlen_attention"]
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
    report = apply(gm, p.pod_attention)
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

    report = apply(captured(decode, q, pool, cu, cu[1:], table), p.pod_attention)
    assert report.misses[0].reason == "pages of 8 tokens"


@pytest.mark.parametrize(
    ("fn", "reason"), [(with_log_sum_exp, "the log-sum-exp is used"), (not_causal, "not causal")]
)
def test_varlen_that_means_something_else_stays(fn: Any, reason: str):
    report = apply(captured(fn, *packed_rows()), p.pod_attention)
    assert not report.matches
    assert report.misses[0].reason == reason


def test_varlen_through_pages_is_attention_of_each_sequence():
    """What a GPU runs for a call over its own tokens."""
    q, k, v, cu = packed_rows()
    padded = [torch.cat((x, x[:2])) for x in (q, k, v)]
    y = p.varlen_through_pages(*padded, cu, 20, 0.125, 0)
    torch.testing.assert_close(y[:28], sdpa_by_sequence(q, k, v, cu), rtol=0, atol=1e-5)
    assert not y[28:].any()
