"""Triangular systems become the operator, from either side."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, capture, run, same_bits

from llm42c.passes.base import Context
from llm42c.passes.check import unplaced
from llm42c.passes.solve_triangular import solve_triangular

G = torch.Generator().manual_seed(1)
A = torch.randn(3, 7, 7, generator=G) / 7 + torch.eye(7)
B = torch.randn(3, 7, 5, generator=G)
SOLVE = torch.ops.llm42.solve_triangular


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("fn", "want"),
    [
        (lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), SOLVE(A, B, False, False)),
        (
            lambda a, b: torch.linalg.solve_triangular(a, b, upper=True, unitriangular=True),
            SOLVE(A, B, True, True),
        ),
        (
            lambda a, b: torch.linalg.solve_triangular(a, b.mT, upper=False, left=False),
            SOLVE(A.mT, B, True, False).mT,
        ),
    ],
)
def test_systems(fn, want, dynamic, grad):
    gm = capture(fn, A, B, dynamic=dynamic)
    report = apply(gm, solve_triangular, ctx=Context(grad=grad))
    assert (len(report.matches), report.misses) == (1, [])
    assert not unplaced(gm.graph)
    assert same_bits(run(gm), want)


def test_fp64_is_left_alone():
    gm = capture(lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), A.double(), B.double())
    report = apply(gm, solve_triangular)
    assert report.reasons() == {"dtypes torch.float64 and torch.float64": 1}
    assert unplaced(gm.graph)


def test_what_follows_may_be_cut_at_a_symbol():
    """A result of other strides: values downstream are computed again, slices up to a size among them."""

    def fn(a, b, rows):
        x = torch.linalg.solve_triangular(a, b, upper=False)
        return x.transpose(0, 1)[: rows.shape[0]] * 2

    gm = capture(fn, A, B, torch.ones(4), dynamic=True)
    assert len(apply(gm, solve_triangular).matches) == 1
    assert same_bits(run(gm), SOLVE(A, B, False, False).transpose(0, 1)[:4] * 2)
