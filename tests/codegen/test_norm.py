"""RMSNorm, its fusion with the residual addition, and LayerNorm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm42c.codegen.ops import norm, registry
from llm42c.codegen.order import LANES

registry.load()
ops = torch.ops.llm42
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = 2.0**-24


def rows(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, n], weight [n], bias [n]"""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(m, n, generator=g), 1 + torch.randn(n, generator=g) / 4
    return x.to(dtype), weight.to(dtype), torch.randn(n, generator=g).to(dtype)


def rounding(dtype: torch.dtype) -> float:
    """Unit roundoff of the storage type; 0 for fp32, whose roundings are counted apart."""
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 16, 50, 576])
def test_rms_norm_is_the_specification_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    x, weight, _ = rows(20, n, dtype)
    x = x * torch.exp2(torch.arange(n) % 13 - 6).to(dtype)
    simulated = norm.rms_norm.simulators[LANES]
    for args in (
        (x, weight, 1e-5, 0.0, True),
        (x, None, 1e-5, 0.0, True),
        (x, weight, 1e-5, 1.0, False),
        (x, weight.float(), 1e-5, 1.0, False),
    ):
        assert torch.equal(ops.rms_norm(*args), simulated(*args))
    if n == 576 and dtype == torch.float32:
        backwards = simulated(x.flip(1), None, 1e-5, 0.0, True).flip(1)
        assert not torch.equal(backwards, simulated(x, None, 1e-5, 0.0, True))  # the order matters here


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 16, 50, 576])
def test_layer_norm_is_the_specification_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    x, weight, bias = rows(20, n, dtype)
    simulated = norm.layer_norm.simulators[LANES]
    for parameters in ((weight, bias), (weight, None), (None, bias), (weight.float(), bias.float())):
        assert torch.equal(ops.layer_norm(x + 3, *parameters, 1e-5), simulated(x + 3, *parameters, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast_first", [True, False])
@pytest.mark.parametrize("n", [1, 33, 576, 4099])
def test_rms_norm_within_its_bound(n: int, cast_first: bool, dtype: torch.dtype) -> None:
    x, weight, _ = rows(5, n, dtype)
    y = ops.rms_norm(x, weight, 1e-6, 0.5, cast_first).double()
    exact = norm.rms_norm.reference(x, weight, 1e-6, 0.5, cast_first)
    # The sum of squares: n / 16 + 5 roundings, halved by the root; then at most 8 single operations.
    relative = ((n / 16 + 5) / 2 + 8) * U32 + (3 if cast_first else 1) * rounding(dtype) * 1.01
    assert ((y - exact).abs() <= relative * exact.abs() + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 33, 576])
def test_layer_norm_within_its_bound(n: int, dtype: torch.dtype) -> None:
    x, weight, bias = rows(5, n, dtype)
    x = x + 3
    y = ops.layer_norm(x, weight, bias, 1e-5).double()
    exact = norm.layer_norm.reference(x, weight, bias, 1e-5)
    normed = norm.layer_norm.reference(x, None, None, 1e-5).abs()
    sums = (n / 16 + 8) * U32  # relative error of a sum over the row
    shift = sums * x.double().abs().mean(-1, keepdim=True)  # of the mean
    scale = torch.rsqrt(x.double().var(-1, correction=0, keepdim=True) + 1e-5)
    error = shift * scale + normed * (2 * sums + 8 * U32 + (shift * scale) ** 2)
    bound = error * weight.double().abs() + (2 * U32 + rounding(dtype)) * 1.01 * (
        normed * weight.double().abs() + bias.double().abs()
    )
    assert ((y - exact).abs() <= bound).all()
    half_given = ops.layer_norm(x, weight, None, 1e-5), ops.layer_norm(x, None, bias, 1e-5)
    assert torch.equal(half_given[0], ops.layer_norm(x, weight, torch.zeros_like(bias), 1e-5))
    assert torch.equal(half_given[1], ops.layer_norm(x, torch.ones_like(weight), bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast_first", [True, False])
def test_fused_addition_has_the_bits_of_two_operators(cast_first: bool, dtype: torch.dtype) -> None:
    x, weight, _ = rows(9, 100, dtype)
    residual = rows(9, 100, dtype, seed=1)[0]
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5, 0.0, cast_first)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, ops.rms_norm(residual + x, weight, 1e-5, 0.0, cast_first))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_number_or_position(dtype: torch.dtype) -> None:
    x, weight, bias = rows(70, 577, dtype)
    residual = rows(70, 577, dtype, seed=1)[0]
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, _: ops.rms_norm(x, weight, 1e-5, 0.0, True),
        lambda x, r: torch.cat(ops.add_rms_norm(x, r, weight, 1e-5, 0.0, False), -1),
        lambda x, _: ops.layer_norm(x, weight, bias, 1e-5),
    ]
    g = torch.Generator().manual_seed(2)
    for f in functions:
        alone = torch.cat([f(x[i : i + 1], residual[i : i + 1]) for i in range(70)])
        for m in (*range(1, 71), 200):
            pick = torch.randint(70, (m,), generator=g)
            assert torch.equal(f(x[pick], residual[pick]), alone[pick])


def test_threads_change_nothing() -> None:
    x, weight, bias = rows(300, 577, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((ops.rms_norm(x, weight, 1e-5, 0.0, True), ops.layer_norm(x, weight, bias, 1e-5)))
    finally:
        torch.set_num_threads(before)
    for rms, layer in results[1:]:
        assert torch.equal(rms, results[0][0])
        assert torch.equal(layer, results[0][1])


def test_strides_and_empty_inputs() -> None:
    x, weight, bias = rows(6, 40, torch.float32)
    wide = torch.randn(6, 100)
    wide[:, 30:70] = x
    y = ops.rms_norm(x, weight, 1e-5, 0.0, True)
    assert torch.equal(ops.rms_norm(wide[:, 30:70], weight, 1e-5, 0.0, True), y)
    assert torch.equal(ops.rms_norm(x.t().contiguous().t(), weight, 1e-5, 0.0, True), y)
    swapped = ops.rms_norm(x.view(2, 3, 40).transpose(0, 1), weight, 1e-5, 0.0, True)
    assert torch.equal(swapped.transpose(0, 1), y.view(2, 3, 40))
    assert swapped.is_contiguous()
    spread = torch.stack((weight, bias), 1)
    assert torch.equal(ops.rms_norm(x, spread[:, 0], 1e-5, 0.0, True), y)
    assert ops.rms_norm(torch.empty(0, 40), weight, 1e-5, 0.0, True).shape == (0, 40)
    assert ops.layer_norm(torch.empty(3, 0), None, None, 1e-5).shape == (3, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.rms_norm(x, torch.ones(3), 1e-5, 0.0, True), r"expected weight \[4\]"),
        (lambda x: ops.rms_norm(x, torch.ones(4, dtype=torch.float64), 1e-5, 0.0, False), "of dtype"),
        (lambda x: ops.rms_norm(x.half(), torch.ones(4), 1e-5, 0.0, True), "with cast_first"),
        (lambda x: ops.rms_norm(x.long(), None, 1e-5, 0.0, True), "expected float32, bfloat16 or float16"),
        (lambda x: ops.rms_norm(torch.tensor(1.0), None, 1e-5, 0.0, True), "at least one dimension"),
        (lambda x: ops.add_rms_norm(x, x[:1], None, 1e-5, 0.0, True), r"expected residual \[2, 4\]"),
        (lambda x: ops.add_rms_norm(x, x.half(), None, 1e-5, 0.0, True), "expected residual of dtype"),
        (lambda x: ops.layer_norm(x, None, torch.ones(5), 1e-5), r"expected bias \[4\]"),
        (lambda x: ops.layer_norm(x.half(), torch.ones(4), torch.ones(4).half(), 1e-5), "of one dtype"),
    ],
)
def test_errors_say_what_was_expected(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.zeros(2, 4))


def test_opcheck() -> None:
    x, weight, bias = rows(3, 20, torch.float32)
    residual = torch.randn(3, 20)
    torch.library.opcheck(ops.rms_norm.default, (x, None, 1e-5, 0.0, True))
    torch.library.opcheck(ops.add_rms_norm.default, (x.t(), residual.t(), None, 1e-5, 0.0, True))
    for t in (x, weight, bias, residual):
        t.requires_grad_()
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-5, 1.0, False))
    torch.library.opcheck(ops.add_rms_norm.default, (x, residual, weight, 1e-5, 0.0, True))
    torch.library.opcheck(ops.layer_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(ops.layer_norm.default, (x, None, None, 1e-5))


def test_gradients() -> None:
    x, weight, bias = (t.requires_grad_() for t in rows(5, 40, torch.float32))
    residual, up = torch.randn(5, 40, requires_grad=True), torch.randn(5, 40)

    def eager_rms(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (w + 0.5)

    pairs: list[tuple[Tensor, Tensor, list[Tensor]]] = [
        (ops.rms_norm(x, weight, 1e-5, 0.5, False), eager_rms(x, weight), [x, weight]),
        (ops.rms_norm(x, None, 1e-5, 0.0, True), eager_rms(x, torch.tensor(0.5)), [x]),
        (
            torch.add(*ops.add_rms_norm(x, residual, weight, 1e-5, 0.5, False)),
            eager_rms(x + residual, weight) + (x + residual),
            [x, residual, weight],
        ),
        (
            ops.layer_norm(x, weight, bias, 1e-5),
            torch.nn.functional.layer_norm(x, (40,), weight, bias, 1e-5),
            [x, weight, bias],
        ),
    ]
    for ours, theirs, inputs in pairs:
        for a, b in zip(
            torch.autograd.grad(ours, inputs, up), torch.autograd.grad(theirs, inputs, up), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=100 * U32, atol=400 * U32)
