"""einsum becomes products that have one order."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits

from llm42c.passes.check import unplaced
from llm42c.passes.einsum import einsum
from llm42c.passes.linear import linear
from llm42c.passes.matmul import matmul

G = torch.Generator().manual_seed(9)
SIZES = {"b": 2, "c": 3, "l": 5, "s": 4, "h": 2, "n": 7, "p": 6, "z": 3, "k": 9}


def _operand(letters: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn([SIZES[c] for c in letters], generator=G).to(dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "equation",
    [
        "bclhn,bcshn->bclsh",
        "bclsh,bcshp->bclhp",
        "bclhn,bclhp->bchpn",
        "bzch,bzhpn->bchpn",
        "bclhn,bchpn->bclhp",
        "blk,kn->bln",
        "bl,bl->b",
        "bhln,n->bhl",
        "ls,lsk->k",
    ],
)
def test_products(equation: str, dynamic: bool) -> None:
    first, second = equation.split("->")[0].split(",")
    a, b = _operand(first), _operand(second)
    gm = capture(lambda a, b: torch.einsum(equation, a, b), a, b, dynamic=dynamic)
    assert len(apply(gm, einsum).matches) == 1
    apply(gm, linear, matmul)
    assert not unplaced(gm.graph)
    exact = torch.einsum(equation, a.double(), b.double())
    size = torch.einsum(equation, a.abs().double(), b.abs().double())
    got = run(gm)
    assert got.shape == exact.shape
    assert ((got - exact).abs() <= 40 * 2.0**-24 * size).all()


def test_a_batch_does_not_show() -> None:
    """The guard: what is computed alone has the bits that it has among others."""

    def fn(a, b):
        return torch.einsum("bclhn,bcshn->bclsh", a, b)

    a, b = _operand("bclhn"), _operand("bcshn")
    outs = []
    for part in (slice(None), slice(1, 2)):
        gm = capture(fn, a[part].contiguous(), b[part].contiguous())
        apply(gm, einsum)
        apply(gm, matmul)
        outs.append(run(gm))
    assert same_bits(outs[0][1:], outs[1])


def test_nothing_is_summed() -> None:
    a, b = _operand("bl"), _operand("sb")
    gm = capture(lambda a, b: torch.einsum("bl,sb->sbl", a, b), a, b)
    apply(gm, einsum)
    assert "matmul" not in calls(gm)
    assert same_bits(run(gm), (a * b.unsqueeze(-1)).contiguous())


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda a, b: torch.einsum("bl->b", a), "two operands"),
        (lambda a, b: torch.einsum("bl,sn->bn", a, b), "a sum over one operand"),
        (lambda a, b: torch.einsum("...l,...l->...", a, a), "the equation"),
    ],
)
def test_near_misses(fn, reason) -> None:
    gm = capture(fn, _operand("bl"), _operand("sn"))
    report = apply(gm, einsum)
    assert not report.matches
    assert reason in " ".join(report.reasons())
