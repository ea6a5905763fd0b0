"""Products with quantised weights of one input become one call, with every bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import apply, calls, capture, run, same_bits
from test_linear_q import weight
from torch import Tensor, nn

from llm42c.passes.base import PACKED, Context
from llm42c.passes.linear_add import linear_add
from llm42c.passes.linear_q import linear_q
from llm42c.quantised import QuantisedLinear

CTX = Context(target=PACKED)
X = torch.randn(1, 7, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
R = torch.randn(1, 7, 40, generator=torch.Generator().manual_seed(1)).bfloat16()


def linear(format: str, n: int = 40, bias: bool = False, seed: int = 0) -> QuantisedLinear:
    parameter = nn.Parameter(torch.randn(n).bfloat16()) if bias else None
    made = QuantisedLinear(n, 512, format, parameter)
    made.weight.data = weight(format, n, seed=seed)
    return made


class Layer(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k = linear("q4_k", bias=bias), linear("q8_0", 17, bias=bias)
        self.v, self.o = linear("q6_k", bias=bias), linear("q5_0", bias=not bias)
        self.gate, self.up = linear("q4_0"), linear("q4_1")


LAYER = Layer()


def test_several_products_of_one_input() -> None:
    gm = capture(lambda x: (LAYER.q(x), LAYER.k(x), LAYER.v(x.sin())), X)
    before = run(gm)
    assert len(apply(gm, linear_q, ctx=CTX).matches) == 2
    (merged, alone) = [n for n in gm.graph.nodes if n.target is torch.ops.llm42.linear_q.default]
    assert merged.args[2:] == ("q4_k,q8_0", [40, 17], None, None, False)
    assert alone.args[2] == "q6_k"
    assert all(same_bits(a, b) for a, b in zip(run(gm), before, strict=True))


@pytest.mark.parametrize("turned", [False, True])
def test_a_gate_and_what_it_gates(turned: bool) -> None:
    def fn(x: Tensor) -> Tensor:
        gate, up = F.silu(LAYER.gate(x)), LAYER.up(x)
        return up * gate if turned else gate * up

    gm = capture(fn, X)
    assert len(apply(gm, linear_q, ctx=CTX).matches) == 1
    assert calls(gm) == {"llm42::linear_q": 1}
    (call,) = [n for n in gm.graph.nodes if n.target is torch.ops.llm42.linear_q.default]
    assert call.args[2:] == ("q4_0,q4_1", [40, 40], None, None, True)
    separate = torch.cat([LAYER.gate(X), LAYER.up(X)], -1)
    assert same_bits(run(gm), torch.ops.llm42.silu_mul(separate))


def test_an_addition_is_taken_along() -> None:
    gm = capture(lambda x, r: (r + LAYER.q(x), LAYER.o(x.sin()) + r), X, R)
    assert len(apply(gm, linear_q, linear_add, ctx=CTX).matches) == 2
    assert all(n.args[5] is not None for n in gm.graph.nodes if n.target is torch.ops.llm42.linear_q.default)
    found = run(gm)
    assert same_bits(found[0], R + LAYER.q(X))
    assert same_bits(found[1], LAYER.o(X.sin()) + R)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: F.silu(LAYER.gate(x)) * LAYER.up(x.sin()), "several inputs"),
        (lambda x: F.silu(LAYER.gate(x)) * LAYER.o(x), "have a bias"),
        (lambda x: (F.silu(LAYER.gate(x)) * (y := LAYER.up(x)), y), "used elsewhere"),
        (lambda x: F.silu(LAYER.gate(x)) * LAYER.up(x)[:, :1], None),
    ],
)
def test_what_is_no_gate(fn: Callable[[Tensor], Any], reason: str | None) -> None:
    gm = capture(fn, X)
    report = apply(gm, linear_q, ctx=CTX)
    assert all(n.args[6] is False for n in gm.graph.nodes if n.target is torch.ops.llm42.linear_q.default)
    assert reason is None or reason in " | ".join(report.reasons())


def test_what_adds_more_than_a_product() -> None:
    gm = capture(lambda x, r: (y := LAYER.q(x)) + r + y.sin(), X, R)
    report = apply(gm, linear_q, linear_add, ctx=CTX)
    assert report.matches == []
    assert "used elsewhere" in " | ".join(report.reasons())
