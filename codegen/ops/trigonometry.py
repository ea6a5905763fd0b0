"""Cosine and sine in one order: the same bits on every machine.

Libraries round them differently for each instruction set. Here every step is one correctly rounded operation
on doubles (a product, a sum, a choice), so nothing is left to the machine; the result is within one unit in
the last place of a double before it is rounded to the dtype of x. For tables that are computed once.

Reduction: n = round(x · 2/π), r = x − n · π/2, where π/2 is four pieces of 27 bits, so that n times a piece
is exact. Then Taylor's series of r in [−π/4, π/4] by Horner's rule, its end first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

_PI = Fraction(314159265358979323846264338327950288419716939937510, 10**50)
_BITS = 27
_LARGEST = 2**25  # quarter turns; n · piece has at most 53 bits then
_CHUNK = 1 << 15  # elements that are computed at a time: they stay in the cache


def _pieces(value: Fraction) -> list[float]:
    """Four doubles whose sum is ``value`` to 108 bits, the first three of 27 bits each."""
    found, unit = [], Fraction(2)  # value lies in [1, 2)
    for _ in range(3):
        unit /= 2**_BITS
        piece = value // unit * unit
        found.append(float(piece))
        value -= piece
    return [*found, float(value)]


_HALF_PI = _pieces(_PI / 2)
_SINE = [(-1) ** i / math.factorial(2 * i + 1) for i in range(10)]
_COSINE = [(-1) ** i / math.factorial(2 * i) for i in range(10)]


def cos(x: Tensor) -> Tensor:
    """x: floating point, any shape → cos(x) in x.dtype. Raises ValueError beyond 2^25 quarter turns."""
    return _apply(x, 1)


def sin(x: Tensor) -> Tensor:
    """x: floating point, any shape → sin(x) in x.dtype. Raises ValueError beyond 2^25 quarter turns."""
    return _apply(x, 0)


def _apply(x: Tensor, shift: int) -> Tensor:
    flat = x.reshape(-1)
    out = torch.empty_like(flat)
    for start in range(0, flat.numel(), _CHUNK):
        out[start : start + _CHUNK] = _sine(flat[start : start + _CHUNK].double(), shift)
    return out.view(x.shape)


def _sine(x: Tensor, shift: int) -> Tensor:
    """sin(x + shift · π/2), x: [N] float64."""
    n = torch.round(x * (2 / math.pi))
    if not x.is_meta and not bool((n.abs() < _LARGEST).all()):
        raise ValueError("an angle is beyond 2^25 quarter turns, or no number")
    r = x
    for piece in _HALF_PI:
        r = r - n * piece
    square = r * r
    quarter = torch.remainder(n + shift, 4)
    value = torch.where(quarter % 2 == 1, _series(_COSINE, square), r * _series(_SINE, square))
    return torch.where(quarter >= 2, -value, value)


def _series(coefficients: list[float], square: Tensor) -> Tensor:
    value = torch.full_like(square, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * square + coefficient
    return value


ORDERED: dict[str, Callable[[Tensor], Tensor]] = {"cos": cos, "sin": sin}
