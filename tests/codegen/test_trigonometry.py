"""Cosines and sines in one order: against libraries in fp64, and the same bits whoever computes."""

from __future__ import annotations

import math

import pytest
import torch

from llm42c.codegen.ops import trigonometry

WANTED = {"cos": torch.cos, "sin": torch.sin}


def angles(dtype: torch.dtype) -> torch.Tensor:
    """Rotary angles of 131072 positions, and some near multiples of π/2. → [N]"""
    g = torch.Generator().manual_seed(0)
    rotary = torch.arange(131072).float()[:, None] * torch.rand(1, 8, generator=g)
    near = (torch.arange(-500, 500) * (math.pi / 2)).float()
    tiny = torch.tensor([0.0, 1e-30, -1e-8, 1e-3])
    return torch.cat((rotary.flatten(), near, -rotary[::1000].flatten(), tiny)).to(dtype)


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_within_a_unit_in_the_last_place(name: str) -> None:
    x = angles(torch.float64)
    mine, wanted = trigonometry.ORDERED[name](x), WANTED[name](x)
    assert (mine - wanted).abs().max() <= 2**-52
    for dtype in (torch.float32, torch.bfloat16):
        low = angles(dtype)
        rounded = WANTED[name](low.double()).to(dtype)
        assert (trigonometry.ORDERED[name](low).double() - rounded.double()).abs().max() <= 2**-24
        assert trigonometry.ORDERED[name](low).dtype == dtype


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_an_element_does_not_see_the_others(name: str) -> None:
    x = angles(torch.float32)
    whole = trigonometry.ORDERED[name](x)
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:4001]
    assert torch.equal(trigonometry.ORDERED[name](x[index]), whole[index])
    assert torch.equal(trigonometry.ORDERED[name](x[:-5].view(-1, 1))[:, 0], whole[:-5])
    assert not torch.equal(whole, WANTED[name](x))  # a library's are others: the test could have failed


def test_what_it_cannot_do_is_an_error() -> None:
    for x in (1e9, math.nan, math.inf):
        with pytest.raises(ValueError, match="beyond 2\\^25 quarter turns"):
            trigonometry.cos(torch.tensor([x]))
