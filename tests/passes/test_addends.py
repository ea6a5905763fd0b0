"""Products with an addend and factors become products and sums that have one order."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits

from llm42c.passes.addends import addends
from llm42c.passes.check import unplaced
from llm42c.passes.linear import linear
from llm42c.passes.matmul import matmul

G = torch.Generator().manual_seed(3)
C, A, B = (torch.randn(*s, generator=G) for s in ((2, 5, 7), (2, 5, 8), (2, 8, 7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 0.25), (1.0, 8**-0.5), (0, 2)])
@pytest.mark.parametrize("batched", [True, False])
def test_values(batched: bool, beta: float, alpha: float, dtype: torch.dtype) -> None:
    c, a, b = (t.to(dtype) if batched else t[0].to(dtype) for t in (C, A, B))
    function = torch.baddbmm if batched else torch.addmm
    gm = capture(lambda c, a, b: function(c, a, b, beta=beta, alpha=alpha), c, a, b)
    plain = not batched and beta == alpha == 1  # a linear with a bias of its own kind
    assert len(apply(gm, addends).matches) == (0 if plain else 1)
    if plain:
        return
    apply(gm, linear, matmul)
    assert not unplaced(gm.graph)
    exact = function(c.double(), a.double(), b.double(), beta=beta, alpha=alpha)
    size = function(c.double().abs(), a.double().abs(), b.double().abs(), beta=beta, alpha=alpha)
    assert ((run(gm) - exact).abs() <= 11 * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs()).all()


def test_an_addend_that_counts_nothing_is_not_read() -> None:
    gm = capture(lambda c, a, b: torch.baddbmm(c, a, b, beta=0), C * torch.nan, A, B)
    assert len(apply(gm, addends, matmul).matches) == 1
    assert run(gm).isfinite().all()


def test_the_method_with_names() -> None:
    gm = capture(lambda c, a, b: c.baddbmm(batch1=a, batch2=b, beta=1.0, alpha=0.5), C[:, :1], A, B)
    assert len(apply(gm, addends).matches) == 1
    assert calls(gm) == {"bmm": 1, "mul": 1, "add": 1}
    want = torch.bmm(A, B) * 0.5 + C[:, :1]
    assert same_bits(run(gm), want)


def test_fp64_is_left_alone() -> None:
    gm = capture(torch.baddbmm, C.double(), A.double(), B.double())
    report = apply(gm, addends)
    assert not report.matches
    assert "float64" in " ".join(report.reasons())
