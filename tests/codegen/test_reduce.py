"""Sums, softmax and log-softmax of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm42c.codegen import simulate
from llm42c.codegen.ops import reduce, registry

registry.load()
ops = torch.ops.llm42
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = 2.0**-24
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: ops.row_sum(x, [-1], True),
    ops.row_softmax,
    ops.row_log_softmax,
)


def values(m: int, n: int, dtype: torch.dtype) -> Tensor:
    return (4 * torch.randn(m, n, generator=torch.Generator().manual_seed(n))).to(dtype)


def rounding(dtype: torch.dtype) -> float:
    return U32 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("n", [1, 16, 50, 577])
def test_sum_is_the_specification_bit_for_bit(n: int) -> None:
    x = values(7, n, torch.float32)
    acc = simulate.lane_sum(x)
    assert torch.equal(ops.row_sum(x, [-1], True), acc)
    if n == 577:
        assert not torch.equal(ops.row_sum(x.flip(1), [1], True), acc)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 33, 5000])
def test_within_their_bounds(n: int, dtype: torch.dtype) -> None:
    x = values(5, n, dtype)
    wide, u = x.double(), rounding(dtype)
    sums = (n / 16 + 5) * U32
    total, exact = ops.row_sum(x, [-1], False).double(), wide.sum(-1)
    assert ((total - exact).abs() <= sums * wide.abs().sum(-1) * (1 + u) + u * exact.abs()).all()
    depth = (wide.amax(-1, keepdim=True) - wide).abs()
    # An exponential: its argument's rounding and 2 ulp; the sum, the division.
    relative = (depth + 4 + depth.amax() + 4) * U32 + sums + 2 * U32
    p, exact = ops.row_softmax(x).double(), torch.softmax(wide, -1)
    assert (
        (p - exact).abs() <= relative * exact + u * exact * 1.01 + torch.finfo(dtype).smallest_normal
    ).all()
    q, exact = ops.row_log_softmax(x).double(), torch.log_softmax(wide, -1)
    log_sum = wide.exp().sum(-1, keepdim=True).log() - wide.amax(-1, keepdim=True)
    absolute = relative.amax() + (depth + 4 * log_sum.abs() + exact.abs()) * U32
    assert ((q - exact).abs() <= absolute + u * exact.abs() * 1.01).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", FUNCTIONS)
def test_rows_and_threads_change_nothing(f: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = values(70, 577, dtype)
    alone = torch.cat([f(x[i : i + 1]) for i in range(70)])
    g = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    try:
        for m in (*range(1, 71), 300):
            torch.set_num_threads(1 + m % 3)
            pick = torch.randint(70, (m,), generator=g)
            assert torch.equal(f(x[pick]), alone[pick])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(f(x.t().contiguous().t()), alone)
    assert torch.equal(f(x.repeat(1, 2)[:, :577]), alone)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    data=st.data(),
    keepdim=st.booleans(),
)
def test_any_dimensions(shape: list[int], data: st.DataObject, keepdim: bool) -> None:
    rank = len(shape)
    dims = data.draw(st.lists(st.integers(-rank, rank - 1), unique_by=lambda d: d % rank, max_size=rank))
    x = torch.randn(shape)
    y = ops.row_sum(x, dims, keepdim)
    assert y.shape == x.sum(dims, keepdim=keepdim).shape
    exact = reduce.row_sum.reference(x, dims, keepdim)
    assert ((y - exact).abs() <= 300 * U32 * reduce.row_sum.reference(x.abs(), dims, keepdim)).all()
    order = sorted(d % rank for d in dims) if dims else list(range(rank))
    last = x.movedim(order, list(range(rank - len(order), rank))).flatten(rank - len(order))
    assert torch.equal(ops.row_sum(last, [-1], False).flatten(), y.flatten())


def test_masked_and_extreme_rows() -> None:
    inf = float("inf")
    x = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [inf, 0.0, 0.0], [3e38, -3e38, 0.0]])
    p, q = ops.row_softmax(x), ops.row_log_softmax(x)
    assert torch.equal(p.isnan(), torch.softmax(x, -1).isnan())
    assert torch.equal(q.isnan(), torch.log_softmax(x, -1).isnan())
    assert p[0, 1] == 0
    assert q[0, 1] == -inf
    assert torch.equal(p[3], torch.tensor([1.0, 0.0, 0.0]))
    assert ops.row_softmax(torch.tensor([0.0, float("nan")])).isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.row_sum(torch.zeros(2, 3), [2], False), r"expected dim in \[-2, 1\], got 2"),
        (lambda: ops.row_sum(torch.zeros(2, 3), [1, -1], False), "appears twice"),
        (lambda: ops.row_sum(torch.zeros(2, 3).long(), [1], False), "expected float32"),
        (lambda: ops.row_softmax(torch.tensor(1.0)), "at least one dimension"),
        (lambda: ops.row_log_softmax(torch.zeros(2, 3).double()), "row_log_softmax: expected float32"),
    ],
)
def test_errors_say_what_was_expected(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_opcheck_and_gradients() -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    calls: list[tuple[Any, tuple[Any, ...], Callable[[Tensor], Tensor]]] = [
        (ops.row_sum.default, ([0, -1], False), lambda t: t.sum((0, -1))),
        (ops.row_sum.default, ([1], True), lambda t: t.sum(1, keepdim=True)),
        (ops.row_sum.default, ([], False), lambda t: t.sum()),
        (ops.row_softmax.default, (), lambda t: t.softmax(-1)),
        (ops.row_log_softmax.default, (), lambda t: t.log_softmax(-1)),
    ]
    for overload, args, eager in calls:
        torch.library.opcheck(overload, (x, *args))
        expected = eager(x)
        up = torch.randn(expected.shape)
        (ours,) = torch.autograd.grad(overload(x, *args), x, up)
        (theirs,) = torch.autograd.grad(expected, x, up)
        torch.testing.assert_close(ours, theirs, rtol=60 * U32, atol=60 * U32)
