"""One spelling for one meaning; nothing that can be noticed changes."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x + x.sin(), {"sin": 1, "add": 1}),
        (lambda x: x.add(x.cos()), {"cos": 1, "add": 1}),
        (lambda x: 2 * x, {"mul": 1}),
        (lambda x: 1 - x, {"sub": 1}),
        (lambda x: 1 / x.exp(), {"exp": 1, "reciprocal": 1}),
        (lambda x: 2 / x.exp(), {"exp": 1, "truediv": 1}),
        (lambda x: x.exp() ** 0.5 + x.exp() ** -1, {"exp": 2, "sqrt": 1, "reciprocal": 1, "add": 1}),
        (lambda x: x.pow(2), {"square": 1}),
        (lambda x: x**2, {"square": 1}),
        (lambda x: x * x, {"square": 1}),
        (lambda x: torch.pow(x.abs() + 1, -0.5), {"abs": 1, "add": 1, "rsqrt": 1}),
        (lambda x: x * torch.sigmoid(x), {"sigmoid": 1, "mul": 1}),  # silu rounds differently
        (lambda x: x.bfloat16().type_as(x), {"to": 2}),
        (lambda x: x.to(torch.float64).to(x), {"to": 2}),
        (lambda x: x.to(device="cpu", dtype=torch.bfloat16), {"to": 1}),
        (lambda x: torch.nn.functional.softmax(x, dim=-1), {"softmax": 1}),
        (lambda x: torch.nn.functional.softmax(x, -1, 3, torch.float64), {"softmax": 1}),
        (lambda x: torch.Tensor.softmax(x, -1, torch.float64), {"softmax": 1}),
        (lambda x: torch.special.expit(torch.swapaxes(x, 0, 1)), {"transpose": 1, "sigmoid": 1}),
        (lambda x: torch.Tensor.multiply(x, 3).true_divide(5), {"mul": 1, "div": 1}),
        (torch.nn.ReLU(), {"relu": 1}),
        (lambda x: torch.nn.functional.relu(x.sin(), True) + 1, {"sin": 1, "relu": 1, "add": 1}),
        (lambda x: x.permute(1, 0).reshape(4, 6), {"permute": 1, "reshape": 1}),
        (lambda x: x[:, :, None] @ x[:, None, :], {"getitem": 2, "mul": 1}),
        (lambda x: x[:, None, :, None] @ x[0].reshape(1, 8), {"getitem": 2, "reshape": 1, "mul": 1}),
        (lambda x: x[:, None, :] @ x[:, :, None], {"getitem": 2, "matmul": 1}),
        (lambda x: x[None, :, :1] @ x[None, :1, :], {"getitem": 2, "mul": 1}),
    ],
)
def test_spelling(fn, expected):
    gm = capture(fn, X)
    apply(gm)
    assert calls(gm) == expected
    assert same_bits(run(gm), fn(X))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.float().sin(),
        lambda x: x.to(torch.float32).sin(),
        lambda x: x.to("cpu").sin(),
        lambda x: x.contiguous().sin(),
        lambda x: torch.nn.functional.dropout(x, 0.5, training=False).sin(),
        lambda x: (x.exp() * 1.0).sin(),
    ],
)
def test_what_does_nothing_goes_away(fn):
    gm = capture(fn, X)
    apply(gm)
    assert set(calls(gm)) <= {"sin", "exp"}
    assert same_bits(run(gm), fn(X))


def test_a_copy_that_can_be_noticed_stays():
    """``x * 1.0`` is a new tensor: the graph must not return its own input instead."""
    gm = capture(lambda x: x * 1.0, X)
    apply(gm)
    assert run(gm).data_ptr() != gm.meta["inputs"][0].data_ptr()


def test_a_copy_before_a_write_stays():
    def fn(x):
        a = x.exp()
        b = a * 1.0
        b.add_(1)
        return a + b

    gm = capture(fn, X)
    apply(gm)
    assert same_bits(run(gm), fn(X))


def test_minus_zero_survives():
    """-0.0 + 0 is +0.0, so an addition of zero is not nothing."""
    zero = torch.tensor([-0.0, 1.0])
    gm = capture(lambda x: x.neg().neg() + 0.0, zero)
    apply(gm)
    assert same_bits(run(gm), torch.tensor([0.0, 1.0]))


def test_symbolic_floats_are_read():
    """Under dynamic=True an attribute such as an epsilon is a symbolic float."""

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 0.125

        def forward(self, x):
            return x + self.eps

    gm = capture(Scale(), X, dynamic=True)
    apply(gm)
    assert same_bits(run(gm), X + 0.125)
