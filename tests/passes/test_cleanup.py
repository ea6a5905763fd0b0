"""Dead code and common subexpressions: only what cannot be noticed goes."""

from __future__ import annotations

import torch
from graphs import apply, calls, capture, run, same_bits

from llm42c.passes.cleanup import common_subexpressions, dead_code

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


def test_equal_calls_become_one():
    gm = capture(lambda x: x.sin().unsqueeze(1) + x.sin().unsqueeze(1), X)
    apply(gm, common_subexpressions)
    assert calls(gm) == {"sin": 1, "unsqueeze": 1, "add": 1}
    assert same_bits(run(gm), X.sin().unsqueeze(1) * 2)


def test_two_results_stay_two_tensors():
    """The caller may write to one of them."""
    gm = capture(lambda x: (x.sin(), x.sin()), X)
    apply(gm, common_subexpressions)
    assert calls(gm)["sin"] == 2


def test_arguments_that_only_look_equal_are_kept_apart():
    """1, 1.0 and True are equal as Python values and different as arguments."""
    gm = capture(lambda x: torch.cat([(x.long() + 1).double(), (x.long() + 1.0).double()]), X)
    apply(gm, common_subexpressions)
    assert calls(gm)["add"] == 2
    assert same_bits(run(gm), torch.cat([(X.long() + 1).double(), (X.long() + 1.0).double()]))


def test_random_calls_are_neither_shared_nor_dropped():
    gm = capture(lambda x: torch.rand(3) + torch.rand(3) + x[0, :3], X)
    apply(gm, common_subexpressions, dead_code)
    assert calls(gm)["rand"] == 2


def test_a_written_tensor_is_never_shared():
    def fn(x):
        a, b = x.sin(), x.sin()
        a.add_(1)
        return a + b

    gm = capture(fn, X)
    apply(gm, common_subexpressions, dead_code)
    assert same_bits(run(gm), X.sin() + 1 + X.sin())


def test_writes_are_not_dead():
    def fn(x, y):
        y.copy_(x)
        x.cos()
        return x.sin()

    gm = capture(fn, X, torch.zeros_like(X))
    apply(gm, dead_code)
    assert calls(gm) == {"copy_": 1, "sin": 1}
