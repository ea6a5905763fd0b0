"""Sites that a pass of packed graphs looks at and leaves are named, with the reason."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graphs import apply, capture

from llm42c.passes.base import PACKED, Context
from llm42c.passes.merge_linears import merge_linears
from llm42c.passes.rotary import rotary

X = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(1))
HEADS, TABLE = torch.randn(1, 2, 7, 8), torch.randn(1, 1, 7, 8)
PACKED_GRAPH = Context(target=PACKED)


class Projections(torch.nn.Module):
    def __init__(self, computed: bool, biases: tuple[bool, bool]) -> None:
        super().__init__()
        self.computed = computed
        self.a, self.b = (torch.nn.Linear(8, 4, bias=bias) for bias in biases)

    def forward(self, x):
        weight = self.a.weight * 2 if self.computed else self.a.weight
        return F.linear(x, weight, self.a.bias), self.b(x)


def reasons(model) -> str:
    """With parameters as attributes, as in packed graphs."""
    gm = capture(model, X)
    for node in [n for n in gm.graph.nodes if n.op == "placeholder" and "l_x" not in n.name]:
        node.op = "get_attr"
        node.target = node.name
        setattr(gm, node.name, torch.nn.Parameter(torch.empty(node.meta["example_value"].shape)))
    return " ".join(apply(gm, merge_linears, ctx=PACKED_GRAPH).reasons())


def test_products_of_one_input_that_cannot_be_stacked():
    assert "computed" in reasons(Projections(True, (False, False)))
    assert "no other product of its input has a bias" in reasons(Projections(False, (True, False)))
    assert reasons(Projections(False, (False, False))) == ""


def test_a_rotation_of_other_halves():
    def turned(x, cos, sin, of):
        return x * cos + torch.cat((-of[..., 4:], of[..., :4]), -1) * sin

    gm = capture(lambda x, cos, sin: turned(x, cos, sin, x.flip(1)), HEADS, TABLE, TABLE)
    assert "two halves" in " ".join(apply(gm, rotary, ctx=PACKED_GRAPH).reasons())
    gm = capture(lambda x, cos, sin: turned(x, cos, sin, x), HEADS, TABLE, TABLE)
    report = apply(gm, rotary, ctx=PACKED_GRAPH)
    assert (len(report.matches), report.misses) == (1, [])
