"""Writes become values where nobody can tell, and stay where somebody could."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, run
from torch import Tensor, fx

from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport
from llm42c.passes.cleanup import erase_dead_code
from llm42c.passes.normalize import normalize


def normalized(fn: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    gm = capture(fn, *inputs)
    normalize(gm.graph, Context(), PassReport("normalize"))
    erase_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def writes(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes if g.mutated_arguments(n)]


def scattered(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x)
    mask.scatter_(1, x.argmax(-1, keepdim=True), 1.0)
    return x * mask.unsqueeze(0)


def divided(x: Tensor) -> Tensor:
    top, _ = x.topk(2, -1)
    top /= top.sum(-1, keepdim=True)
    return top + 1


def added(x: Tensor) -> Tensor:
    y = x.exp()
    y += x
    y *= 2
    return y


def by_parts(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], 6)
    y[..., 2:].copy_(x[..., :4])
    y[..., :2].copy_(x[..., 4:6])
    return y * 2


def through_a_view(x: Tensor) -> Tensor:
    y = x.exp().transpose(0, 1)
    y += x.transpose(0, 1)
    return y * 2


def some_rows(x: Tensor) -> Tensor:
    y = x.exp()
    y[1:] += x[1:]
    y[:, 2:5] = x[:, :3]
    return y * 2


def an_older_view(x: Tensor) -> Tensor:
    y = x.exp()
    view = y[:, :2]
    y += 1
    return view * 2


def an_input(x: Tensor) -> Tensor:
    x += 1
    return x * 2


def a_gap(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], 7)
    y[..., :2].copy_(x[..., :2])
    y[..., 3:].copy_(x[..., :4])
    return y * 2


def rows_of_an_older_view(x: Tensor) -> Tensor:
    y = x.exp()
    view = y[2:]
    y[1:] = x[1:]
    return view * 2


def chosen_rows(x: Tensor) -> Tensor:
    y = x.exp()
    y[x[:, 0] > 0] = 0.0
    return y * 2


def a_scalar(x: Tensor) -> Tensor:
    total = x.new_zeros(())
    y = x.new_empty(())
    y.copy_(x[0, 0])
    return x * (total + y)


def inputs() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "fn", [scattered, divided, added, by_parts, through_a_view, some_rows], ids=lambda f: f.__name__
)
def test_writes_become_values(fn: Callable[..., Any]) -> None:
    gm = normalized(fn, inputs())
    assert writes(gm) == []
    assert torch.equal(run(gm), fn(inputs()))


NEAR_MISSES = [an_older_view, rows_of_an_older_view, chosen_rows, an_input, a_gap]


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_misses_stay(fn: Callable[..., Any]) -> None:
    gm = normalized(fn, inputs())
    assert writes(gm) != []
    gm.meta["inputs"] = [inputs() if isinstance(t, Tensor) else t for t in gm.meta["inputs"]]
    assert torch.equal(run(gm), fn(inputs()))


SPELLINGS: dict[str, Callable[[Tensor], Any]] = {
    "F.relu by name": lambda y: F.relu(y, inplace=True),
    "F.relu by place": lambda y: F.relu(y, True),
    "F.relu of input": lambda y: F.relu(input=y, inplace=True),
    "nn.ReLU": torch.nn.ReLU(inplace=True),
    "method": lambda y: y.relu_(),
    "torch.relu_": torch.relu_,
    "F.silu by place": lambda y: F.silu(y, True),
    "F.leaky_relu by place": lambda y: F.leaky_relu(y, 0.1, True),
    "F.hardtanh by name": lambda y: F.hardtanh(y, -0.1, 0.1, inplace=True),
    "F.dropout by place": lambda y: F.dropout(y, 1.0, True, True),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("of", ["own", "input", "view"])
def test_activations_in_place_are_writes(spelling: str, of: str) -> None:
    """Who reads the tensor afterwards, or a view of it, reads what the activation left there."""

    def fn(x: Tensor) -> Tensor:
        y = x if of == "input" else x.sin()
        SPELLINGS[spelling](y[:, :4] if of == "view" else y)
        return y + 1

    raw = capture(fn, inputs())
    assert writes(raw) != []
    gm = normalized(fn, inputs())
    gm.meta["inputs"] = [inputs() if isinstance(t, Tensor) else t for t in gm.meta["inputs"]]
    expected = fn(inputs())
    assert torch.equal(run(gm), expected)
    untouched = inputs() if of == "input" else inputs().sin()
    assert not torch.equal(expected, untouched + 1), "vacuous: nothing was written"
