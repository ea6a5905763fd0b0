"""What is left of sums, means and softmaxes has one order, and stays accurate."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits

from llm42c.passes.base import Context
from llm42c.passes.check import unplaced
from llm42c.passes.layer_norm import layer_norm
from llm42c.passes.reductions import reductions

EPS = 2.0**-24
N = 37
X = torch.randn(4, 5, N, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("fn", "magnitude"),
    [
        (lambda x: x.sum(-1), lambda x: x.abs().sum(-1)),
        (lambda x: x.sum(), lambda x: x.abs().sum()),
        (lambda x: torch.sum(x, (1, 2), keepdim=True), lambda x: x.abs().sum((1, 2), keepdim=True)),
        (lambda x: x.mean(dim=2), lambda x: x.abs().mean(2)),
        (lambda x: x.mean(), lambda x: x.abs().mean()),
        (lambda x: x.softmax(-1), lambda x: 4 * torch.ones_like(x)),
        (lambda x: x.softmax(1), lambda x: 4 * torch.ones_like(x)),
        (lambda x: torch.nn.functional.log_softmax(x, dim=-1), lambda x: 8 + x.abs()),
        (lambda x: x.var(-1), lambda x: 4 * x.square().mean(-1)),
        (lambda x: x.var(-1, unbiased=False), lambda x: 4 * x.square().mean(-1)),
        (lambda x: x.std(-1, keepdim=True), lambda x: 4 * x.square().mean(-1, keepdim=True) + 4),
        (lambda x: x.cumsum(-1), lambda x: x.abs().cumsum(-1)),
        (lambda x: torch.cumsum(x, dim=1), lambda x: x.abs().cumsum(1)),
        (lambda x: torch.cumprod(x, -1), lambda x: x.abs().cumprod(-1)),
        (lambda x: torch.logsumexp(x, -1), lambda x: 8 + x.abs().amax(-1)),
    ],
)
def test_accuracy(fn, magnitude, dynamic):
    gm = capture(fn, X, dynamic=dynamic)
    report = apply(gm, reductions)
    assert len(report.matches) == 1
    assert not unplaced(gm.graph)
    got, exact = run(gm), fn(X.double())
    assert got.shape == exact.shape
    assert ((got - exact).abs() <= X.numel() * EPS * magnitude(X.double())).all()


@pytest.mark.parametrize("fn", [lambda x: x.sum(-1), lambda x: x.mean(-1), lambda x: x.softmax(-1)])
def test_half_precision_rounds_once(fn):
    x = X.bfloat16()
    gm = capture(fn, x)
    assert len(apply(gm, reductions).matches) == 1
    got, exact = run(gm), fn(x.double())
    assert got.dtype == torch.bfloat16
    assert ((got - exact).abs() <= 2.0**-8 * exact.abs() + N * EPS * x.double().abs().sum(-1).max()).all()


def test_softmax_in_another_dtype():
    x = X.bfloat16()
    gm = capture(lambda x: torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32), x)
    apply(gm, reductions)
    assert same_bits(run(gm), torch.ops.llm42.row_softmax(x.float()))


def test_sums_of_integers_stay():
    gm = capture(lambda x: (x > 0).sum(-1) + x.long().cumsum(-1).sum(-1), X)
    report = apply(gm, reductions)
    assert not report.matches
    assert calls(gm)["sum"] == 2
    assert not unplaced(gm.graph)


def test_other_running_reductions_are_named():
    gm = capture(lambda x: x.logcumsumexp(-1), X)
    apply(gm, reductions)
    (event,) = unplaced(gm.graph)
    assert "logcumsumexp" in event.reason


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm(affine, dtype):
    norm = torch.nn.LayerNorm(N, eps=1e-3, elementwise_affine=affine).to(dtype)
    x = X.to(dtype)
    gm = capture(norm, x)
    assert len(apply(gm, layer_norm).matches) == 1
    assert same_bits(run(gm), torch.ops.llm42.layer_norm(x, norm.weight, norm.bias, 1e-3))


def test_running_sums_keep_their_dtype_and_see_the_past_only():
    x = X.bfloat16()
    gm = capture(lambda x: x.cumsum(1, dtype=torch.float32), x)
    assert len(apply(gm, reductions).matches) == 1
    assert same_bits(run(gm), torch.ops.llm42.running_sum(x.float(), 1))
    gm = capture(lambda x: x.long().cumsum(1), X)
    assert not apply(gm, reductions).matches


def test_a_running_product_has_no_gradient():
    gm = capture(lambda x: x.cumprod(1), X)
    report = apply(gm, reductions, ctx=Context(grad=True))
    assert "no autograd formula" in next(iter(report.reasons()))
