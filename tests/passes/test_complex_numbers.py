"""Complex products are real ones, whose bits do not depend on how many a library takes at a time."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits

from llm42c.passes.check import unplaced
from llm42c.passes.complex_numbers import complex_numbers

G = torch.Generator().manual_seed(2)
X = torch.randn(3, 5, 2, 14, generator=G)
ANGLES = torch.randn(3, 5, 7, generator=G)


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """As models with complex rotary positions write it. x: [B, S, H, D], angles: [B, S, D / 2]."""
    freqs = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs.unsqueeze(2)).flatten(3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_rotary_positions(dynamic: bool) -> None:
    gm = capture(_rotated, X, ANGLES, dynamic=dynamic)
    report = apply(gm, complex_numbers)
    assert len(report.matches) >= 3
    assert "polar" not in calls(gm)
    assert not unplaced(gm.graph)
    if dynamic:
        return  # its inputs are symbols
    pairs, cos, sin = X.unflatten(-1, (7, 2)), ANGLES.cos()[:, :, None], ANGLES.sin()[:, :, None]
    real, imaginary = pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos
    assert same_bits(run(gm), torch.stack([real, imaginary], -1).flatten(3))
    exact = _rotated_fp64()
    assert ((run(gm) - exact).abs() <= 4 * 2.0**-23 * X.abs().max()).all()


def _rotated_fp64() -> torch.Tensor:
    freqs = torch.polar(torch.ones_like(ANGLES).double(), ANGLES.double())
    pairs = torch.view_as_complex(X.double().reshape(3, 5, 2, 7, 2))
    return torch.view_as_real(pairs * freqs.unsqueeze(2)).flatten(3)


def test_no_complex_arithmetic_is_left() -> None:
    gm = capture(_rotated, X, ANGLES)
    assert {"mul: unknown", "polar: unknown"} <= {event.reason for event in unplaced(gm.graph)}
    apply(gm, complex_numbers)
    made = [n for n in gm.graph.nodes if n.op == "call_function" and str(n.target).endswith("mul")]
    assert all(not n.meta["example_value"].is_complex() for n in made)


@pytest.mark.parametrize("factor", [1.25, 3])
def test_real_factors(factor: float) -> None:
    """On either side; the bits are those of two real products."""

    def scaled(pairs: torch.Tensor) -> torch.Tensor:
        number = torch.view_as_complex(pairs)
        return torch.view_as_real(number * factor) + torch.view_as_real(factor * number)

    pairs = X.unflatten(-1, (7, 2)).contiguous()
    gm = capture(scaled, pairs)
    assert unplaced(gm.graph)
    assert apply(gm, complex_numbers).matches
    assert not unplaced(gm.graph)
    assert same_bits(run(gm), pairs * factor + pairs * factor)


def test_fp64_and_other_arithmetic_are_left_alone() -> None:
    gm = capture(lambda a: torch.view_as_real(torch.view_as_complex(a) + 1), X.unflatten(-1, (7, 2)))
    assert not apply(gm, complex_numbers).matches
    gm = capture(
        lambda a: torch.view_as_real(torch.view_as_complex(a).square()), X.unflatten(-1, (7, 2)).double()
    )
    assert not apply(gm, complex_numbers).matches
