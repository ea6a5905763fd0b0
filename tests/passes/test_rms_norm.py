"""Every spelling of RMSNorm calls the operator with the right rounding, weight and epsilon."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from llm42c.passes.add_rms_norm import add_rms_norm
from llm42c.passes.rms_norm import rms_norm

OPS = torch.ops.llm42
HIDDEN = 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _norm(cls, dtype, eps=1e-3):
    norm = cls(HIDDEN, eps=eps).to(dtype)
    generator = torch.Generator().manual_seed(1)
    norm.weight.data = torch.randn(HIDDEN, generator=generator).to(dtype)
    return norm


def _x(dtype, *shape):
    return torch.randn(*(shape or (2, 5, HIDDEN)), generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("cls", "offset", "cast_first"),
    [
        (LlamaRMSNorm, 0.0, True),
        (Qwen3RMSNorm, 0.0, True),
        (T5LayerNorm, 0.0, True),
        (Gemma2RMSNorm, 1.0, False),
        (Olmo2RMSNorm, 0.0, False),
    ],
)
def test_models(cls, offset, cast_first, dtype, dynamic):
    norm, x = _norm(cls, dtype), _x(dtype)
    gm = capture(norm, x, dynamic=dynamic)
    report = apply(gm, rms_norm)
    assert len(report.matches) == 1
    assert not report.misses
    assert calls(gm)["llm42::rms_norm"] == 1
    assert not {"rsqrt", "mean", "square"} & set(calls(gm))
    assert same_bits(run(gm), OPS.rms_norm(x, norm.weight, 1e-3, offset, cast_first))


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("weight", [True, False])
def test_functional(weight, eps):
    norm, x = torch.nn.RMSNorm(HIDDEN, eps=eps, elementwise_affine=weight), _x(torch.float32)
    gm = capture(norm, x)
    assert len(apply(gm, rms_norm).matches) == 1
    exact = torch.nn.functional.rms_norm(
        x.double(), (HIDDEN,), None if norm.weight is None else norm.weight.double(), eps or 2.0**-23
    )
    # A sum of H squares, a root and two products: each step adds at most half an ulp.
    assert ((run(gm) - exact).abs() <= (HIDDEN + 4) * 2.0**-24 * exact.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weight(dtype):
    def fn(x):
        wide = x.float()
        return (torch.rsqrt(1e-5 + wide.square().mean(-1, keepdim=True)) * wide).to(x.dtype)

    gm = capture(fn, _x(dtype))
    assert len(apply(gm, rms_norm).matches) == 1
    assert same_bits(run(gm), OPS.rms_norm(_x(dtype), None, 1e-5, 0.0, True))


def test_operands_in_the_other_order():
    def fn(x, w):
        return torch.rsqrt(1e-5 + (x * x).mean(dim=[-1], keepdim=True)) * x * w

    w = torch.rand(HIDDEN)
    gm = capture(fn, _x(torch.float32), w)
    assert len(apply(gm, rms_norm).matches) == 1
    assert same_bits(run(gm), OPS.rms_norm(_x(torch.float32), w, 1e-5, 0.0, True))


def _over_first(x):
    return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5)


def _used_twice(x):
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x * r + r


def _in_double(x):
    wide = x.double()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).float()


def _written_in_between(x):
    a = x.sin()
    older = a[:1]  # read after the write, which therefore stays one
    r = torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-5)
    a.add_(1)
    return a * r + older.exp().sum()


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (_over_first, "last dimension"),
        (_used_twice, "other users"),
        (_in_double, "float64"),
        (_written_in_between, "written"),
    ],
)
def test_look_alikes_are_left_alone(fn, reason):
    gm = capture(fn, _x(torch.float32))
    before = run(gm)
    gm = capture(fn, _x(torch.float32))
    report = apply(gm, rms_norm)
    assert not report.matches
    assert reason in " ".join(report.reasons())
    assert same_bits(run(gm), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_addition(dtype):
    norm = _norm(LlamaRMSNorm, dtype)
    a, b = _x(dtype), _x(dtype).flip(1)

    def fn(a, b):
        h = a + b
        return norm(h), h.sin()

    gm = capture(fn, a, b)
    report = apply(gm, rms_norm, add_rms_norm)
    assert len(report.matches) == 1
    assert calls(gm) == {"llm42::add_rms_norm": 1, "getitem": 2, "sin": 1}
    normed, total = OPS.add_rms_norm(b, a, norm.weight, 1e-3, 0.0, True)
    got = run(gm)
    assert same_bits(got[0], normed)
    assert same_bits(got[1], total.sin())
    assert same_bits(normed, OPS.rms_norm(a + b, norm.weight, 1e-3, 0.0, True))  # the fusion changes no bit


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda a, b, norm: norm(torch.add(a, b, alpha=2)), "scales"),
        (lambda a, b, norm: norm(a + b[:, :1]), "broadcasts"),
        (lambda a, b, norm: norm(a * b), "no addition"),
    ],
)
def test_other_additions_are_left_alone(fn, reason):
    norm = _norm(LlamaRMSNorm, torch.float32)
    gm = capture(lambda a, b: fn(a, b, norm), _x(torch.float32), _x(torch.float32))
    report = apply(gm, rms_norm, add_rms_norm)
    assert not report.matches
    assert reason in " ".join(report.reasons())
