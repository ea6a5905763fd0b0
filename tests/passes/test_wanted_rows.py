"""The choice of the rows whose logits are wanted moves up, with every bit; and stays where others read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits
from torch import Tensor

from llm42c.codegen.ops import registry
from llm42c.passes import graph as g
from llm42c.passes.base import PACKED, Context
from llm42c.passes.wanted_rows import wanted_rows

registry.load()
CTX = Context(target=PACKED)
OPS = torch.ops.llm42
G = torch.Generator().manual_seed(0)
X, H = (torch.randn(1, 13, 64, generator=G).bfloat16() for _ in range(2))
WANTED = torch.tensor([12, 3, 3, 0])
SQUARE, GATED = (OPS.linear_pack(torch.randn(n, 64, generator=G).bfloat16()) for n in (64, 192))
DOWN = OPS.linear_pack(torch.randn(64, 96, generator=G).bfloat16())
WEIGHT = torch.randn(64, generator=G).bfloat16()


def last_layer(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y, h = OPS.add_rms_norm.default(OPS.linear.default(x, SQUARE, None, 64), h, WEIGHT, 1e-5, 0.0, False)
    h = OPS.linear_add.default(OPS.linear_silu_mul.default(y, GATED, 96), DOWN, None, h, 64)
    return OPS.rms_norm.default(h, WEIGHT, 1e-5, 0.0, False), h


def products(gm: torch.fx.GraphModule) -> list[int]:
    """Rows of every product, in order."""
    return [g.fake(n).shape[-2] for n in gm.graph.nodes if g.name(n).startswith("llm42::linear")]


CHOICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "subscript": lambda x, wanted: x[:, wanted, :],
    "short": lambda x, wanted: x[:, wanted],
    "index_select": lambda x, wanted: torch.index_select(x, 1, wanted),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_layer_is_computed_for_the_wanted_rows(choice: str) -> None:
    gm = capture(lambda x, h, wanted: CHOICES[choice](last_layer(x, h)[0], wanted), X, H, WANTED)
    before = run(gm)
    assert products(gm) == [13, 13, 13]
    assert len(apply(gm, wanted_rows, ctx=CTX).matches) == 1
    assert products(gm) == [4, 4, 4]
    assert same_bits(run(gm), before)
    assert calls(gm)["index_select"] == 2  # of x and of h, once each


def test_a_layer_before_it_keeps_its_rows() -> None:
    def fn(x: Tensor, h: Tensor, wanted: Tensor) -> Tensor:
        y, h = OPS.add_rms_norm.default(x, h, WEIGHT, 1e-5, 0.0, False)
        mixed = OPS.linear.default(y, SQUARE, None, 64).cumsum(1)
        return last_layer(mixed, h)[0][:, wanted]

    gm = capture(fn, X, H, WANTED)
    before = run(gm)
    assert len(apply(gm, wanted_rows, ctx=CTX).matches) == 1
    assert products(gm) == [13, 4, 4, 4]
    assert same_bits(run(gm), before)


def test_what_others_read_keeps_its_rows() -> None:
    gm = capture(
        lambda x, h, wanted: [o[:, wanted] if i == 0 else o for i, o in enumerate(last_layer(x, h))],
        X,
        H,
        WANTED,
    )
    before = run(gm)
    report = apply(gm, wanted_rows, ctx=CTX)
    assert not report.matches
    assert "nobody else reads" in " ".join(report.reasons())
    assert all(same_bits(a, b) for a, b in zip(run(gm), before, strict=True))


def test_a_call_that_mixes_rows_stops_it() -> None:
    def fn(x: Tensor, h: Tensor, wanted: Tensor) -> Tensor:
        return OPS.linear.default(OPS.linear.default(x, SQUARE, None, 64).cumsum(1), SQUARE, None, 64)[
            :, wanted
        ]

    gm = capture(fn, X, H, WANTED)
    before = run(gm)
    assert len(apply(gm, wanted_rows, ctx=CTX).matches) == 1
    assert products(gm) == [13, 4]
    assert same_bits(run(gm), before)


@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(lambda y, wanted: y[:, :, wanted], id="columns"),
        pytest.param(lambda y, wanted: y[:, wanted.sort()[0]], id="computed"),
        pytest.param(lambda y, wanted: y[:, wanted[:, None]], id="two dimensions"),
        pytest.param(lambda y, wanted: y[:, :4], id="a slice"),
    ],
)
def test_other_choices_are_left_alone(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm = capture(lambda x, h, wanted: choose(last_layer(x, h)[0], wanted), X, H, WANTED)
    assert not apply(gm, wanted_rows, ctx=CTX).matches
