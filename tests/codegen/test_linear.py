"""The linear operators: exact specification, accuracy, and bits that depend on nothing but the row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.cpu.packing import PANEL
from llm42c.codegen.ops import linear, registry

registry.load()
ops = torch.ops.llm42
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = 2.0**-24  # unit roundoff of fp32


def problem(m: int, k: int, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, k], weight [n, k], bias [n]"""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g).to(dtype)
    weight = torch.randn(n, k, generator=g).to(dtype)
    return x, weight, torch.randn(n, generator=g).to(dtype)


def cancelling(m: int, k: int, n: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`problem`, but the terms of every sum cancel, so that y is nothing but rounding errors.

    With ordinary inputs, rounding to 16 bits hides most differences of order.
    """
    x, weight, bias = problem(m, k, n, dtype, seed)
    half = k // 2
    order = torch.randperm(half, generator=torch.Generator().manual_seed(seed))
    x[:, half : 2 * half] = x[:, order]
    weight[:, half : 2 * half] = -weight[:, order]
    weight[:, 2 * half :] = 0
    return 16 * x, 16 * weight, bias / 4096


def chain(x: Tensor, weight: Tensor) -> Tensor:
    """The specification: acc = fma(x[k], w[k], acc), k ascending. → fp32 [m, n]"""
    return simulate.chain(x[:, None], weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_chain_of_the_specification(dtype: torch.dtype) -> None:
    x, weight, bias = cancelling(5, 300, 70, dtype)
    acc = chain(x, weight)
    packed = ops.linear_pack(weight)
    assert torch.equal(ops.linear(x, packed, None, 70), acc.to(dtype))
    assert torch.equal(ops.linear(x, packed, bias, 70), (acc + bias.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_products_are_exact_so_a_plain_loop_has_the_same_bits(dtype: torch.dtype) -> None:
    x, weight, _ = cancelling(4, 577, 50, dtype)
    acc = torch.zeros(4, 50)
    for k in range(577):
        acc = acc + x[:, k, None].float() * weight[None, :, k].float()
    assert torch.equal(ops.linear_dense(x, weight, None), acc.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inputs_reveal_another_order(dtype: torch.dtype) -> None:
    x, weight, _ = cancelling(5, 300, 70, dtype)
    y = ops.linear_dense(x, weight, None)
    descending = ops.linear_dense(x.flip(-1), weight.flip(-1), None)
    halves = (chain(x[:, ::2], weight[:, ::2]) + chain(x[:, 1::2], weight[:, 1::2])).to(dtype)
    for other in (descending, halves):
        assert (y != other).double().mean() > 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 576, 960), (33, 1536, 100), (300, 70, 97), (7, 1, 1)])
def test_within_the_bound_of_a_chain(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, weight, bias = problem(m, k, n, dtype)
    y = ops.linear(x, ops.linear_pack(weight), bias, n).double()
    exact = linear.linear_dense.reference(x, weight, bias)
    size = linear.linear_dense.reference(x.abs(), weight.abs(), bias.abs())
    gamma = (k + 1) * U32 / (1 - (k + 1) * U32)  # k fused multiply-adds and the bias
    eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert ((y - exact).abs() <= gamma * size * (1 + eps) + eps * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_number_or_position(dtype: torch.dtype) -> None:
    x, weight, bias = cancelling(70, 300, 100, dtype)
    packed = ops.linear_pack(weight)
    alone = torch.cat([ops.linear(x[i : i + 1], packed, bias, 100) for i in range(70)])
    g = torch.Generator().manual_seed(1)
    for m in range(1, 71):
        rows = torch.randint(70, (m,), generator=g)
        assert torch.equal(ops.linear(x[rows], packed, bias, 100), alone[rows]), m
        assert torch.equal(ops.linear_dense(x[rows], weight, bias), alone[rows]), m


def test_rows_of_a_large_call() -> None:
    x, weight, _ = cancelling(600, 130, 49, torch.bfloat16)  # several blocks of rows
    y = ops.linear_dense(x, weight, None)
    for i in (0, 1, 255, 256, 300, 599):
        assert torch.equal(ops.linear_dense(x[i : i + 1], weight, None), y[i : i + 1])


def test_rows_of_a_call_too_large_to_convert_at_once() -> None:
    x, weight, _ = problem(1, 70000, 4, torch.bfloat16)
    packed, residual = ops.linear_pack(weight), torch.randn(300, 4).bfloat16()
    y = ops.linear_add(x.expand(300, 70000), packed, None, residual, 4)
    assert torch.equal(y, residual + ops.linear(x, packed, None, 4))
    gated = ops.linear_silu_mul(x.expand(300, 70000), packed, 2)
    assert torch.equal(gated, ops.linear_silu_mul(x, packed, 2).expand(300, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 64, 300])
def test_threads_change_nothing(m: int, dtype: torch.dtype) -> None:
    x, weight, bias = cancelling(m, 576, 960, dtype)
    packed = ops.linear_pack(weight)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((ops.linear(x, packed, bias, 960), ops.linear_silu_mul(x, packed, 480)))
    finally:
        torch.set_num_threads(before)
    for y, gated in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(gated, results[0][1])


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 40),
    k=st.integers(1, 300),
    n=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
)
def test_packed_dense_and_fused_have_one_set_of_bits(
    m: int, k: int, n: int, dtype: torch.dtype, with_bias: bool
) -> None:
    x, weight, bias = cancelling(m, k, n, dtype, seed=k)
    b = bias if with_bias else None
    packed = ops.linear_pack(weight)
    y = ops.linear(x, packed, b, n)
    assert torch.equal(ops.linear_unpack(packed, n, k), weight)
    assert torch.equal(ops.linear_dense(x, weight, b), y)
    assert torch.equal(ops.linear_dense(x, weight.t().contiguous().t(), b), y)
    residual = torch.randn(m, n).to(dtype)
    assert torch.equal(ops.linear_add(x, packed, b, residual, n), residual + y)
    merged = ops.linear_pack(torch.cat((weight, weight.flip(0))))
    unfused = ops.silu_mul(ops.linear(x, merged, None, 2 * n))
    assert torch.equal(ops.linear_silu_mul(x, merged, n), unfused)


@pytest.mark.parametrize("n", [96, 100])  # whole panels, and not
def test_silu_mul_with_gate_and_up_in_their_places(n: int) -> None:
    x, weight, _ = problem(3, 40, 2 * n, torch.bfloat16)
    gate, up = ops.linear_dense(x, weight[:n], None), ops.linear_dense(x, weight[n:], None)
    fused = ops.linear_silu_mul(x, ops.linear_pack(weight), n)
    assert torch.equal(fused, ops.silu_mul(torch.cat((gate, up), -1)))
    assert not torch.equal(fused, ops.silu_mul(torch.cat((up, gate), -1)))


def test_panels_hold_the_weight_and_zeros() -> None:
    weight = torch.randn(50, 7)
    packed = ops.linear_pack(weight)
    assert packed.shape == (2, 7, PANEL)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -50 % PANEL)).view(2, PANEL, 7).transpose(1, 2)
    assert torch.equal(packed, padded)
    assert torch.equal(ops.linear_pack(weight.t().contiguous().t()), packed)


def test_panels_of_bf16_hold_pairs_with_the_first_in_the_high_half() -> None:
    weight = torch.randn(50, 7).bfloat16()
    packed = ops.linear_pack(weight)
    padded = torch.nn.functional.pad(weight, (0, 1, 0, -50 % PANEL)).view(2, PANEL, 4, 2).transpose(1, 2)
    assert torch.equal(packed, padded.flip(-1))
    assert torch.equal(ops.linear_pack(weight.t().contiguous().t()), packed)


def test_other_strides_of_x() -> None:
    x, weight, _ = problem(6, 40, 50, torch.bfloat16)
    y = ops.linear_dense(x, weight, None)
    wide = torch.randn(6, 100).bfloat16()
    wide[:, 30:70] = x
    assert torch.equal(ops.linear_dense(wide[:, 30:70], weight, None), y)
    assert torch.equal(ops.linear_dense(x.t().contiguous().t(), weight, None), y)
    assert torch.equal(
        ops.linear_dense(x.view(2, 3, 40).transpose(0, 1), weight, None).transpose(0, 1), y.view(2, 3, 50)
    )
    assert torch.equal(ops.linear_dense(x[:1].expand(4, 40), weight, None), y[:1].expand(4, 50))
    packed, residual = ops.linear_pack(weight), torch.randn(6, 80).bfloat16()[:, 20:70]
    assert torch.equal(ops.linear_add(x, packed, None, residual, 50), residual + y)


def test_empty_shapes() -> None:
    weight = torch.randn(50, 40)
    packed = ops.linear_pack(weight)
    for shape in ((0, 40), (3, 0, 40)):
        x = torch.empty(shape)
        assert ops.linear(x, packed, None, 50).shape == (*shape[:-1], 50)
        assert ops.linear_dense(x, weight, None).shape == (*shape[:-1], 50)
        assert ops.linear_silu_mul(x, packed, 25).shape == (*shape[:-1], 25)
    bias = torch.randn(50)
    nothing_to_sum = ops.linear_dense(torch.empty(3, 0), torch.empty(50, 0), bias)
    assert torch.equal(nothing_to_sum, bias.expand(3, 50))
    assert ops.linear_dense(torch.randn(3, 40), torch.empty(0, 40), None).shape == (3, 0)
    assert ops.linear(torch.randn(40), packed, None, 50).shape == (50,)


def test_non_finite_values_stay_in_their_row_and_column() -> None:
    x, weight, _ = problem(5, 40, 100, torch.float32)
    clean = ops.linear_dense(x, weight, None)
    x[2, 7], weight[61, 9] = float("nan"), float("inf")
    y = ops.linear_dense(x, weight, None)
    assert y[2].isnan().all()
    rows, columns = [0, 1, 3, 4], [n for n in range(100) if n != 61]
    assert torch.equal(y[rows][:, columns], clean[rows][:, columns])


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.linear_pack(_x(3)), r"expected weight \[N, K\]"),
        (lambda: ops.linear_pack(_x(3, 4, dtype=torch.float64)), "expected float32, bfloat16 or float16"),
        (lambda: ops.linear_unpack(_x(1, 5, 48), 48, 4), r"weight \[48, 4\]"),
        (lambda: ops.linear(_x(2, 4), _x(1, 5, 48), None, 48), r"weight \[48, 4\]"),
        (lambda: ops.linear(_x(2, 5), _x(1, 5, 48), None, 49), r"weight \[49, 5\]"),
        (lambda: ops.linear(_x(2, 5), _x(1, 5, 48), None, -1), "must not be negative"),
        (lambda: ops.linear(_x(2, 5), _x(1, 5, 48), _x(47), 48), r"expected bias \[48\]"),
        (
            lambda: ops.linear(_x(2, 5), _x(1, 5, 48, dtype=torch.bfloat16), None, 48),
            "expected weight of dtype",
        ),
        (lambda: ops.linear(_x(2, 5), _x(1, 48, 5).transpose(1, 2), None, 48), "contiguous"),
        (lambda: ops.linear_dense(_x(2, 5), _x(3, 4), None), r"expected x \[\.\.\., 4\]"),
        (lambda: ops.linear_dense(_x(2, 5), _x(5), None), r"expected weight \[N, K\]"),
        (lambda: ops.linear_dense(_x(), _x(3, 4), None), "at least one dimension"),
        (lambda: ops.linear_silu_mul(_x(2, 5), _x(1, 5, 48), 48), r"weight \[96, 5\]"),
        (lambda: ops.linear_add(_x(2, 5), _x(1, 5, 48), None, _x(2, 47), 48), r"expected residual \[2, 48\]"),
    ],
)
def test_errors_say_what_was_expected(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_opcheck() -> None:
    x, weight, bias = problem(3, 20, 50, torch.float32)
    packed, residual = ops.linear_pack(weight), torch.randn(3, 50)
    for overload, args in (
        (ops.linear_pack.default, (weight,)),
        (ops.linear_unpack.default, (packed, 50, 20)),
        (ops.linear.default, (x, packed, bias, 50)),
        (ops.linear.default, (x.view(3, 1, 20), packed, None, 50)),
        (ops.linear_dense.default, (x, weight, bias)),
        (ops.linear_dense.default, tuple(t.clone().requires_grad_() for t in (x, weight, bias))),
        (ops.linear_silu_mul.default, (x, packed, 25)),
        (ops.linear_add.default, (x, packed, bias, residual, 50)),
    ):
        torch.library.opcheck(overload, args)


@pytest.mark.parametrize("shape", [(4, 20), (2, 3, 20)])
def test_gradients_of_the_dense_product(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(30, 20, requires_grad=True), torch.randn(30, requires_grad=True)
    up = torch.randn(*shape[:-1], 30)
    ours = torch.autograd.grad(ops.linear_dense(x, weight, bias), (x, weight, bias), up)
    theirs = torch.autograd.grad(torch.nn.functional.linear(x, weight, bias), (x, weight, bias), up)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=30 * 2 * U32, atol=30 * 10 * 2 * U32)
    (only_x,) = torch.autograd.grad(ops.linear_dense(x, weight.detach(), None), x, up)
    torch.testing.assert_close(only_x, ours[0])
