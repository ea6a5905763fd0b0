"""Convolutions along time: one tap after the other, whatever the batch and the place."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, capture, run, same_bits

from llm42c.passes.check import unplaced
from llm42c.passes.conv1d import conv1d
from llm42c.passes.linear import linear

F = torch.nn.functional
G = torch.Generator().manual_seed(11)
X = torch.randn(3, 6, 19, generator=G)
DEPTHWISE, DENSE = torch.randn(6, 1, 4, generator=G), torch.randn(5, 6, 3, generator=G)
BIAS = torch.randn(6, generator=G)


class _Layer(torch.nn.Module):
    """A function of an input and of parameters, whose sizes are fixed."""

    def __init__(self, fn, *parameters):
        super().__init__()
        self.fn, self.held = fn, torch.nn.ParameterList(parameters)

    def forward(self, x):
        return self.fn(x, *self.held)


CASES = [
    (lambda x, w, d, b: F.conv1d(x, w, b, padding=3, groups=6)[..., :19], 5),
    (lambda x, w, d, b: F.conv1d(x, w, None, 1, 0, 1, 6), 4),
    (lambda x, w, d, b: F.conv1d(x, w, b, stride=2, padding=(1,), dilation=2, groups=6), 5),
    (lambda x, w, d, b: F.conv1d(x[0], w, b, groups=6), 5),
    (lambda x, w, d, b: F.conv1d(x, d, b[:5], padding=2), 19),
    (lambda x, w, d, b: F.conv1d(x, d, stride=3), 18),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fn", "roundings"), CASES)
def test_accuracy(fn, roundings, dtype, dynamic):
    arguments = [t.to(dtype) for t in (X, DEPTHWISE, DENSE, BIAS)]
    gm = capture(_Layer(fn, *arguments[1:]), arguments[0], dynamic=dynamic)
    assert len(apply(gm, conv1d).matches) == 1
    apply(gm, linear)
    assert not unplaced(gm.graph)
    exact = fn(*(t.double() for t in arguments))
    size = fn(*(t.abs().double() for t in arguments))
    got = run(gm)
    assert got.shape == exact.shape
    assert (
        (got - exact).abs() <= 2 * roundings * 2.0**-24 * size + torch.finfo(dtype).eps * exact.abs()
    ).all()


def _rewritten(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    gm = capture(lambda x, w: F.conv1d(x, w, padding=3, groups=6)[..., : x.shape[-1]], x, w)
    apply(gm, conv1d)
    return run(gm)


def test_a_position_sees_its_own_past_only():
    whole = _rewritten(X, DEPTHWISE)
    assert same_bits(_rewritten(X[1:2, :, :11].contiguous(), DEPTHWISE), whole[1:2, :, :11])
    moved = F.pad(X, (5, 0))
    assert same_bits(_rewritten(moved, DEPTHWISE)[..., 5:], whole)
    assert not same_bits(_rewritten(X.flip(-1), DEPTHWISE), whole)


def test_one_tap_after_the_other():
    """The order, step by step."""
    padded = F.pad(X, (3, 0))
    total = padded[..., :19] * DEPTHWISE[:, 0, 0, None]
    for j in (1, 2, 3):
        total = total + padded[..., j : j + 19] * DEPTHWISE[:, 0, j, None]
    assert same_bits(_rewritten(X, DEPTHWISE), total)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: F.conv1d(x, torch.ones(6, 3, 2), groups=2), "groups of several channels"),
        (lambda x: F.conv1d(x, torch.ones(6, 1, 3), padding="same", groups=6), "not known as numbers"),
        (lambda x: F.conv1d(x.double(), torch.ones(6, 1, 3).double(), groups=6), "float64"),
        (lambda x: F.conv1d(x, torch.ones(6, 1, 65), padding=65, groups=6), "65 taps"),
    ],
)
def test_near_misses(fn, reason):
    gm = capture(fn, X)
    report = apply(gm, conv1d)
    assert not report.matches
    assert reason in " ".join(report.reasons())
    assert unplaced(gm.graph)


def test_gradients():
    gm = capture(lambda x, w, b: F.conv1d(x, w, b, padding=3, groups=6), X, DEPTHWISE, BIAS)
    apply(gm, conv1d)
    ours = [t.clone().requires_grad_() for t in (X, DEPTHWISE, BIAS)]
    exact = [t.double().requires_grad_() for t in (X, DEPTHWISE, BIAS)]
    gm(*ours)[0].square().sum().backward()
    F.conv1d(*exact, padding=3, groups=6).square().sum().backward()
    for got, true in zip(ours, exact, strict=True):
        assert (got.grad - true.grad).abs().max() <= 300 * 2.0**-24 * true.grad.abs().max()
