"""silu(gate) * up: accuracy, the roundings of eager PyTorch, independence of rows."""

from __future__ import annotations

import pytest
import torch

from llm42c.codegen.ops import activation, registry

registry.load()
silu_mul = torch.ops.llm42.silu_mul
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = 2.0**-24


def eager(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 16, 50, 1536])
def test_within_its_bound(columns: int, dtype: torch.dtype) -> None:
    x = (8 * torch.randn(20, 2 * columns, generator=torch.Generator().manual_seed(0))).to(dtype)
    y, exact = silu_mul(x).double(), activation.silu_mul.reference(x)
    eps = torch.finfo(dtype).eps
    # silu in fp32: exp within 2 ulp and three operations; it may fall on the other side of a rounding
    # to dtype, which is one eps of silu; the product is rounded once more.
    tiny = torch.finfo(dtype).smallest_normal * (1 + x.double().chunk(2, -1)[1].abs())
    assert ((y - exact).abs() <= exact.abs() * (8 * U32 + 1.5 * eps) + eps * tiny).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_where_eager_rounds(dtype: torch.dtype) -> None:
    x = (4 * torch.randn(64, 2000, generator=torch.Generator().manual_seed(0))).to(dtype)
    y = silu_mul(x)
    gate, up = x.float().chunk(2, dim=-1)
    one_rounding = (torch.nn.functional.silu(gate) * up).to(dtype)
    # exp differs from torch's by an ulp of fp32, which seldom crosses a rounding boundary of 16 bits.
    assert (y != eager(x)).double().mean() < 0.01
    assert (y != one_rounding).double().mean() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates_are_eager_s(dtype: torch.dtype) -> None:
    gates = [0.0, -0.0, 100.0, -100.0, 6e4, -6e4, float("inf"), float("-inf"), float("nan")]
    x = torch.tensor([[g, 2.0] for g in gates]).to(dtype)
    assert torch.equal(silu_mul(x).isnan(), eager(x).isnan())
    assert torch.equal(silu_mul(x).nan_to_num(), eager(x).nan_to_num())
    assert torch.equal(silu_mul(x).signbit()[:-2], eager(x).signbit()[:-2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_threads_and_strides_change_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(70, 200).to(dtype)
    alone = torch.cat([silu_mul(x[i : i + 1]) for i in range(70)])
    g = torch.Generator().manual_seed(0)
    for m in (*range(1, 71), 400):
        rows = torch.randint(70, (m,), generator=g)
        assert torch.equal(silu_mul(x[rows]), alone[rows])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(silu_mul(x.repeat(10, 1)), alone.repeat(10, 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(silu_mul(x.repeat(1, 2)[:, 100:300].roll(100, 1)), alone)
    assert torch.equal(silu_mul(torch.cat((x, x), 1)[:, :200]), alone)
    assert torch.equal(silu_mul(x.t().contiguous().t()), alone)
    assert torch.equal(silu_mul(x.view(7, 10, 200).transpose(0, 1)).transpose(0, 1), alone.view(7, 10, 100))
    assert silu_mul(x[:0]).shape == (0, 100)


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match=r"expected x \[\.\.\., 2 \* I\]"):
        silu_mul(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="expected float32, bfloat16 or float16"):
        silu_mul(torch.zeros(2, 4, dtype=torch.float64))


def test_opcheck_and_gradient() -> None:
    x = torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(silu_mul.default, (x,))
    torch.library.opcheck(silu_mul.default, (x.detach().t().contiguous().t(),))
    up = torch.randn(3, 10)
    (ours,), (theirs,) = (torch.autograd.grad(f(x), x, up) for f in (silu_mul, eager))
    torch.testing.assert_close(ours, theirs, rtol=20 * U32, atol=20 * U32)
