"""What simulators of orders are made of: fp32 step by step, in plain torch.

Every function here is one correctly rounded operation, or a fixed sequence of them, for each element. None
calls a library's sum, product, exponential or square root in fp32, whose bits hang on the machine:
``torch.sqrt`` for one is not correctly rounded on every CPU. The functions are as slow as that sounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_Real = Tensor | float
LANE_COUNT = 16
_BLOCK = 1 << 13


def fp32(x: _Real) -> Tensor:
    """A number or tensor in fp32."""
    return x.float() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32)


def fma(a: _Real, b: _Real, c: _Real) -> Tensor:
    """round(a · b + c), one rounding."""
    return _fma(fp32(a).double(), fp32(b).double(), fp32(c).double()).float()


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Of fp32 numbers that are held in fp64, where their product is exact.

    Rounding the sum to fp64 and then to fp32 errs only where fp64 lands on the middle of two fp32 numbers,
    or where those are denormal.
    """
    product = a * b
    total = product + c
    rounded = total.float()
    doubt = (total.view(torch.int64) & 0x1FFFFFFF) == 0x10000000
    doubt |= (rounded.abs() <= torch.finfo(torch.float32).tiny) & (total != 0)
    if bool(doubt.any()):
        addend = c.expand(total.shape)[doubt]
        rounded[doubt] = _sum_to_odd(product.expand(total.shape)[doubt], addend, total[doubt]).float()
    return rounded.double()


def _sum_to_odd(x: Tensor, y: Tensor, total: Tensor) -> Tensor:
    """x + y in fp64, rounded to odd instead of to nearest: rounding that to fp32 is right."""
    back = total - x
    error = (x - (total - back)) + (y - back)
    bits = total.view(torch.int64)
    moved = bits + torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where((error != 0) & (bits % 2 == 0), moved, bits).view(torch.float64)


_TINY = 2.0**-126  # the least normal number of fp32, and of bf16
_ROUNDS_TO_TINY = _TINY - 2.0**-151  # with 24 bits and exponents without end; halfway, the even one is taken


def without_denormals(x: Tensor) -> Tensor:
    """Zero for denormals, the sign kept."""
    return torch.where(x.abs() < _TINY, torch.copysign(torch.zeros_like(x), x), x)


def _fma_of_bf16(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As :func:`_fma`, of bf16 numbers a and b that are not denormal, with zero for what would be denormal.

    What counts is whether the sum, rounded as if exponents had no end, is less than the least normal number.
    So near to that, fp64 holds the sum of 16 bits and 24 exactly.
    """
    total = a * b + c
    zero = torch.copysign(torch.zeros_like(total), total)
    return torch.where(total.abs() < _ROUNDS_TO_TINY, zero, _fma(a, b, c))


def div(a: _Real, b: _Real) -> Tensor:
    """round(a / b)."""
    return (fp32(a).double() / fp32(b).double()).float()


def sqrt(x: Tensor) -> Tensor:
    """round(√x): no root of an fp32 number is so near the middle of two that fp64 could err."""
    return fp32(x).double().sqrt().float()


def chain(a: Tensor, b: Tensor, taken: Tensor | None = None) -> Tensor:
    """a, b: [..., K], broadcast → [...]: ``acc = fma(a[k], b[k], acc)`` from 0, k ascending.

    Of two bf16 tensors: without denormals, an odd K padded with zeros. taken: [..., K] bool: what is not
    takes no part.
    """
    step = _fma
    if a.dtype == b.dtype == torch.bfloat16:
        step = _fma_of_bf16
        a, b = (torch.nn.functional.pad(without_denormals(x.float()), (0, x.shape[-1] % 2)) for x in (a, b))
    a, b = fp32(a).double(), fp32(b).double()
    shape = torch.broadcast_shapes(a.shape, b.shape)
    a, b = a.expand(shape), b.expand(shape)
    steps = [a, b] if taken is None else [a, b, taken.expand(shape)]
    return _chains(steps, step)


def _chains(steps: list[Tensor], fused: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """A few thousand chains at a time, which stay in the cache."""
    shape = steps[0].shape[:-1]
    if shape.numel() > _BLOCK:
        dim = next(d for d, size in enumerate(shape) if size > 1)
        size = max(1, _BLOCK // shape[dim + 1 :].numel())
        parts = zip(*(x.split(size, dim) for x in steps), strict=True)
        return torch.cat([_chains(list(part), fused) for part in parts], dim)
    acc = torch.zeros(shape, dtype=torch.float64)
    for k in range(steps[0].shape[-1]):
        x, y, *taken = (step[..., k] for step in steps)
        total = fused(x, y, acc)
        acc = torch.where(taken[0], total, acc) if taken else total
    return acc.float()


def blocks(a: Tensor, b: Tensor) -> Tensor:
    """bf16 a, b: [..., K], broadcast → [...]: 32 places at a time, a chain over the even ones plus a chain
    over the odd ones, added to what came before."""
    acc = torch.zeros(torch.broadcast_shapes(a.shape, b.shape)[:-1])
    for x, y in zip(a.split(32, -1), b.split(32, -1), strict=True):
        even, odd = (_chain_of_places(x, y, first) for first in (0, 1))
        acc = without_denormals(acc + without_denormals(even + odd))
    return acc


def _chain_of_places(a: Tensor, b: Tensor, first: int) -> Tensor:
    """The chain over every second place, with a zero where an odd K leaves a place empty."""
    a, b = (torch.nn.functional.pad(x, (0, x.shape[-1] % 2))[..., first::2] for x in (a, b))
    a, b = (without_denormals(x.float()).double() for x in (a, b))
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return _chains([a.expand(shape), b.expand(shape)], _fma_of_bf16)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sums: Callable[[Tensor, Tensor], Tensor] = chain
) -> Tensor:
    """x: [..., K], weight: [N, K], bias: [N] → [..., N] in x.dtype: ``sums``, the bias, one rounding."""
    y = sums(x.unsqueeze(-2), weight)
    return (y if bias is None else y + fp32(bias)).to(x.dtype)


def integers(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """x: [..., K] → (int64 [..., K] in -127..127, scales [..., K / step]): x is about integer times scale."""
    parts = fp32(x).unflatten(-1, (-1, step))
    largest = parts.abs().amax(-1, keepdim=True)
    finite, counts = largest.isfinite(), largest >= 2.0**-119
    inverse = torch.where(finite & counts, div(127.0, largest), 0.0)
    q = torch.round(torch.where(finite, parts, 0.0) * inverse).long()
    scale = torch.where(finite, torch.where(counts, div(largest, 127.0), 0.0), torch.nan)
    return q.flatten(-2), scale.squeeze(-1)


def lanes(x: Tensor, step: Callable[[Tensor, Tensor], Tensor], lane_count: int = LANE_COUNT) -> Tensor:
    """x: [..., N] → [..., 1]: ``lane = step(lane, x[i])`` from 0, then the sum of the tree of lanes."""
    x = fp32(x)
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % lane_count))
    acc = x.new_zeros(*x.shape[:-1], lane_count)
    for part in padded.split(lane_count, -1):
        acc = step(acc, part)
    while acc.shape[-1] > 1:
        low, high = acc.chunk(2, -1)
        acc = low + high
    return acc


def lane_sum(x: Tensor) -> Tensor:
    """x: [..., N] → [..., 1], by sixteen lanes."""
    return lanes(x, torch.add)


def lane_squares(x: Tensor) -> Tensor:
    """The sum of x², by fused multiply-adds in sixteen lanes: [..., N] → [..., 1]."""
    return lanes(x, lambda acc, part: fma(part, part, acc))


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = fp32(coefficients[0]).expand(x.shape)
    for coefficient in coefficients[1:]:
        value = fma(value, x, coefficient)
    return value


_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # of Cephes: their sum is ln 2, n times the first is exact
_LOG2_E = 1.44269504088896341
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_ROOT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)


def _power_of_two(n: Tensor) -> Tensor:
    """2^n for integral n in [-127, 127]; 0 for -127."""
    return (n.to(torch.int32) + 127 << 23).view(torch.float32)


def _exp_reduced(x: Tensor, n: Tensor) -> Tensor:
    """e^(x - n ln 2), by the polynomial of degree 6 of Cephes expf."""
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, x))
    return fma(_horner(r, _EXP), r * r, r) + 1.0


def exp(x: Tensor) -> Tensor:
    """``exp`` of ``vec/math.h``: for every x, with gradual underflow."""
    x = torch.where(x < -104.0, -104.0, x)
    x = torch.where(x > 89.0, 89.0, x)
    n = torch.round(x * _LOG2_E)
    half = torch.round(n * 0.5)
    return _exp_reduced(x, n) * _power_of_two(half.nan_to_num()) * _power_of_two((n - half).nan_to_num())


def exp_nonpositive(x: Tensor) -> Tensor:
    """``exp_nonpositive`` of ``vec/math.h``: for x <= 0, exactly 0 below -126.5 ln 2."""
    x = torch.where(x < -88.0, -88.0, x)
    magic = fp32(12582912.0 + 127.0)  # 1.5 · 2^23 + 127: the sum is rounded to an integer
    n = fma(x, _LOG2_E, magic) - magic
    return _exp_reduced(x, n) * _power_of_two(n.nan_to_num())


def _split_exponent(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = m · 2^e for normal x > 0 → (m in [√½, √2), e)."""
    shifted = x.contiguous().view(torch.int32) - _ROOT_HALF
    return ((shifted & 0x7FFFFF) + _ROOT_HALF).view(torch.float32), (shifted >> 23).float()


def _log_reduced(f: Tensor, e: Tensor) -> Tensor:
    """log(2^e · (1 + f)), by the polynomial of Cephes logf."""
    square = f * f
    y = fma(e, _LN2_LOW, _horner(f, _LOG) * f * square)
    return fma(e, _LN2_HIGH, f + fma(-0.5, square, y))


def log(x: Tensor) -> Tensor:
    """``log`` of ``vec/math.h``: -inf at 0, NaN below, denormals included."""
    tiny = x < torch.finfo(torch.float32).tiny
    m, e = _split_exponent(torch.where(tiny, x * 8388608.0, x))
    y = _log_reduced(m - 1.0, e - torch.where(tiny, 23.0, 0.0))
    y = torch.where(x == 0, -torch.inf, torch.where(x < 0, torch.nan, y))
    return torch.where(x < torch.inf, y, x)


def neg_log1m(u: Tensor) -> Tensor:
    """``neg_log1m`` of ``vec/math.h``: -log(1 - u) for u in (0, 1)."""
    m, e = _split_exponent(1.0 - u)
    small = u < fp32(0.29)
    return 0.0 - _log_reduced(torch.where(small, 0.0 - u, m - 1.0), torch.where(small, 0.0, e))


def tanh(x: Tensor) -> Tensor:
    """``tanh`` of ``vec/math.h``."""
    square = x * x
    small = x * fma(_horner(square, _TANH), square, 1.0)
    a = x.abs()
    large = 1.0 - div(2.0, exp(a + a) + 1.0)
    return torch.where(a < 0.625, small, torch.where(x < 0, 0.0 - large, large))


def silu_mul(x: Tensor) -> Tensor:
    """x: [..., 2I] = gate | up → [..., I]: silu is rounded to x.dtype before the product is."""
    gate, up = x.float().chunk(2, -1)
    return (div(gate, 1.0 + exp(0.0 - gate)).to(x.dtype).float() * up).to(x.dtype)
