"""Attention as models write it themselves: biases, masks of every spelling, products of three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from graphs import apply, calls, capture, run, same_bits
from torch import Tensor

from llm42c.passes.addends import addends
from llm42c.passes.attention_eager import attention_eager
from llm42c.passes.check import unplaced
from llm42c.passes.matmul import matmul
from llm42c.passes.reductions import reductions

F = torch.nn.functional
OP = torch.ops.llm42.dense_attention
G = torch.Generator().manual_seed(6)
Q, K, V = (torch.randn(2, 4, n, 8, generator=G) for n in (7, 9, 9))
SEEN = torch.rand(2, 1, 7, 9, generator=G) > 0.3
SEEN[..., 0] = True
LEAST = torch.finfo(torch.float32).min
ADDED = torch.where(SEEN, 0.0, LEAST)
ALIBI = torch.randn(8, 1, 9, generator=G)  # [B·H, 1, Sk]
BIAS = torch.randn(1, 4, 7, 9, generator=G)


def _attend(q: Tensor, k: Tensor, v: Tensor, shape: Callable[[Tensor], Tensor]) -> Tensor:
    return F.softmax(shape(q @ k.transpose(2, 3)), -1) @ v


def _bloom(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor, mask: Tensor) -> Tensor:
    """Products [B·H, S, S] with ALiBi as their addend, around a softmax [B, H, S, S]."""
    (b, _, sq, d), sk = q.shape, k.shape[2]
    h = 4  # known at compile time, as in a model's configuration
    kt = k.transpose(2, 3).reshape(b * h, d, sk)
    s = alibi.baddbmm(batch1=q.reshape(b * h, sq, d), batch2=kt, beta=1.0, alpha=0.25)
    p = F.softmax(s.view(b, h, sq, sk) + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(p.view(b * h, sq, sk), v.reshape(b * h, sk, d))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alibi_in_three_dimensions(dtype: torch.dtype, dynamic: bool) -> None:
    q, k, v, alibi = (t.to(dtype) for t in (Q, K, V, ALIBI))
    gm = capture(_bloom, q, k, v, alibi, ADDED.to(dtype), dynamic=dynamic)
    assert len(apply(gm, addends, attention_eager).matches) == 1
    assert not {"bmm", "baddbmm", "softmax"} & set(calls(gm))
    mask = alibi.float().expand(8, 7, 9).reshape(2, 4, 7, 9) + ADDED.to(dtype)
    assert (mask.float()[SEEN.expand(2, 4, 7, 9)] != 0).all()  # the bias counts
    want = OP(q, k, v, mask, 0.25, False, 0, 0.0)
    close = (run(gm) - want.flatten(0, 1)).abs().max()
    assert close <= 4 * torch.finfo(dtype).eps * V.abs().max()


def _three(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    s = torch.bmm(q, k.transpose(1, 2)) / 2.0 + m.expand(2, 4, 7, 9).reshape(8, 7, 9)
    return torch.bmm(s.softmax(-1), v)


def test_three_dimensions_throughout() -> None:
    gm = capture(_three, Q, K, V, ADDED)
    assert len(apply(gm, attention_eager).matches) == 1
    assert same_bits(run(gm), OP(Q, K, V, ADDED, 0.5, False, 0, 0.0).flatten(0, 1))


# (how scores are shaped, the mask and scale that it comes to)
FORMS: dict[str, tuple[Callable[..., Tensor], Tensor | None, float]] = {
    "bias before the scale": (lambda s, seen, bias: (s + bias) * 0.5, BIAS * 0.5, 0.5),
    "bias behind the scale": (lambda s, seen, bias: bias + s * 0.5, BIAS, 0.5),
    "bias taken off": (lambda s, seen, bias: s - bias, -BIAS, 1.0),
    "bias of two dimensions": (lambda s, seen, bias: s + bias[0, 1], BIAS[:1, 1:2], 1.0),
    "two biases": (lambda s, seen, bias: s + bias + bias, BIAS + BIAS, 1.0),
    "where": (lambda s, seen, bias: torch.where(seen, s * 0.5, LEAST), ADDED, 0.5),
    "where behind a bias": (
        lambda s, seen, bias: torch.where(seen, s + bias, -torch.inf),
        torch.where(SEEN, BIAS, -torch.inf),
        1.0,
    ),
    "masked_fill": (lambda s, seen, bias: s.masked_fill(~seen, LEAST), ADDED, 1.0),
    "where with a tensor": (
        lambda s, seen, bias: torch.where(seen, s, torch.full([], LEAST, dtype=s.dtype)),
        ADDED,
        1.0,
    ),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_masks_and_biases(form: str, dynamic: bool) -> None:
    shape, mask, scale = FORMS[form]

    def fn(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        return _attend(q, k, v, lambda s: shape(s, seen, bias))

    gm = capture(fn, Q, K, V, SEEN, BIAS, dynamic=dynamic)
    report = apply(gm, attention_eager)
    assert len(report.matches) == 1, report.reasons()
    assert not {"matmul", "softmax"} & set(calls(gm))
    want = OP(Q, K, V, mask, scale, False, 0, 0.0)
    assert same_bits(run(gm), want)
    assert not same_bits(want, OP(Q, K, V, None, 1.0, False, 0, 0.0))


def test_scores_in_fp32_of_a_model_in_bf16() -> None:
    q, k, v = (t.bfloat16() for t in (Q, K, V))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q.float() @ k.float().transpose(2, 3), -1).to(v.dtype) @ v

    gm = capture(fn, q, k, v)
    assert len(apply(gm, attention_eager).matches) == 1
    assert same_bits(run(gm), OP(q, k, v, None, 1.0, False, 0, 0.0))


def test_queries_that_are_fp32_themselves() -> None:
    v = V.bfloat16()

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q @ k.transpose(2, 3), -1).to(v.dtype) @ v

    gm = capture(fn, Q, K, v)
    assert len(apply(gm, attention_eager).matches) == 1
    assert same_bits(run(gm), OP(Q, K, v.float(), None, 1.0, False, 0, 0.0).bfloat16())


def _near_misses() -> dict[str, tuple[Callable[..., Any], str]]:
    plain = "not between a product"
    return {
        "a bias inside the soft-cap": (
            lambda q, k, v, m: _attend(q, k, v, lambda s: 5 * torch.tanh((s + m) / 5.0)),
            plain,
        ),
        "a scale behind the soft-cap": (
            lambda q, k, v, m: _attend(q, k, v, lambda s: 5 * torch.tanh(s / 5.0) * 2.0),
            plain,
        ),
        "a fill that hides nothing": (
            lambda q, k, v, m: _attend(q, k, v, lambda s: s.masked_fill(m < 0, 0.0)),
            plain,
        ),
        "a softmax over queries": (lambda q, k, v, m: (q @ k.transpose(2, 3)).softmax(-2) @ v, ""),
        "scores multiplied by a tensor": (lambda q, k, v, m: _attend(q, k, v, lambda s: s * m), plain),
        "probabilities that are changed": (
            lambda q, k, v, m: ((q @ k.transpose(2, 3)).softmax(-1) * 2.0) @ v,
            plain,
        ),
        "scores that a mask makes larger": (
            lambda q, k, v, m: (q[:1] @ k[:1].transpose(2, 3) + m).softmax(-1) @ v,
            plain,
        ),
        "fp64": (
            lambda q, k, v, m: _attend(q.double(), k.double(), v.double(), lambda s: s),
            "no tensor of fp32",
        ),
        "groups of heads in a dimension of their own": (
            lambda q, k, v, m: (q[:, None] @ k[:, None].transpose(-1, -2)).softmax(-1) @ v[:, None],
            "5 dimensions",
        ),
    }


@pytest.mark.parametrize("miss", _near_misses())
def test_near_misses(miss: str) -> None:
    fn, reason = _near_misses()[miss]
    gm = capture(fn, Q, K, V, ADDED)
    report = apply(gm, attention_eager)
    assert not report.matches
    assert reason in " ".join(report.reasons())


def test_a_bias_that_is_written_to_in_between() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        bias = m + 1.0
        older = bias[:1]  # read after the write, which therefore stays one
        p = (q @ k.transpose(2, 3) + bias).softmax(-1)
        bias.add_(1.0)
        return p @ v + older.sum()

    gm = capture(fn, Q, K, V, BIAS)
    report = apply(gm, attention_eager)
    assert not report.matches
    assert "written to" in " ".join(report.reasons())


def test_a_scale_that_numpy_computes() -> None:
    """The root of a number is exact; scores divided by a tensor keep their ordered products."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, lambda s: s / np.sqrt(q.shape[-1]))

    gm = capture(fn, Q, K, V)
    apply(gm, attention_eager, matmul, reductions)
    assert not unplaced(gm.graph)
    exact = _attend(Q.double(), K.double(), V.double(), lambda s: s / 8**0.5)
    assert (run(gm) - exact).abs().max() <= 32 * 2.0**-24 * V.abs().max() * (
        1 + Q.abs().max() * K.abs().max()
    )
