"""Roots are correctly rounded: the nearest number of the dtype, by exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.examples import Numbers
from llm42c.codegen.ops import roots


def numbers(dtype: torch.dtype) -> Tensor:
    return (Numbers(torch.float64)(3000) + 1.0001).to(dtype) * 4


def is_nearest(root: float, x: float, dtype: type[np.floating]) -> bool:
    """No neighbour of ``root`` lies nearer to √x: x is between the squares of the middles."""
    below, above = (Fraction(float(np.nextafter(dtype(root), dtype(to)))) for to in (-np.inf, np.inf))
    low, high = (below + Fraction(root)) / 2, (above + Fraction(root)) / 2
    return low**2 <= Fraction(x) <= high**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_number_is_the_root(dtype: torch.dtype) -> None:
    x, kind = numbers(dtype), np.float32 if dtype == torch.float32 else np.float64
    found = roots.sqrt(x)
    assert all(is_nearest(r, v, kind) for r, v in zip(found.tolist(), x.tolist(), strict=True))
    off = torch.from_numpy(np.nextafter(found.numpy(), kind(0)))
    assert not any(is_nearest(r, v, kind) for r, v in zip(off.tolist(), x.tolist(), strict=True))


def test_simulators_take_the_same_root() -> None:
    x = numbers(torch.float32)
    assert torch.equal(roots.sqrt(x), simulate.sqrt(x))
    assert torch.equal(roots.rsqrt(x), simulate.div(1.0, simulate.sqrt(x)))
    assert not torch.equal(roots.rsqrt(x), (1 / x.double().sqrt()).float())  # which is rounded once


def test_dtypes_and_edges() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = numbers(dtype)
        assert roots.sqrt(x).dtype == roots.rsqrt(x).dtype == dtype
        assert torch.equal(roots.sqrt(x), roots.sqrt(x.float()).to(dtype))
    assert torch.equal(roots.sqrt(torch.tensor(4)), torch.tensor(2.0))
    assert torch.equal(roots.rsqrt(torch.tensor([0.0, torch.inf])), torch.tensor([torch.inf, 0.0]))
    assert roots.sqrt(torch.tensor(-1.0)).isnan()
