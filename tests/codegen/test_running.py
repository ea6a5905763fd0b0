"""llm42::running_sum and running_product: one chain a row, which sees its own past only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm42c.codegen.ops import registry, running

registry.load()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUM, PRODUCT = torch.ops.llm42.running_sum, torch.ops.llm42.running_product


def _x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    dim=st.integers(-1, 0),
    dtype=st.sampled_from(DTYPES),
    product=st.booleans(),
    seed=st.integers(0, 99),
)
def test_step_by_step(shape, dim, dtype, product, seed):
    x = _x(*shape, seed=seed).to(dtype)
    total, steps = None, []
    for part in x.float().unbind(dim):
        total = part if total is None else (total * part if product else total + part)
        steps.append(total.to(dtype))
    want = torch.stack(steps, dim) if steps else x
    got = (PRODUCT if product else SUM)(x, dim)
    assert torch.equal(got, want)
    assert got.is_contiguous()


@pytest.mark.parametrize("op", [SUM, PRODUCT])
def test_rows_places_threads_and_what_follows(op):
    x = 1 + 0.1 * _x(300, 200)
    whole, threads = op(x, -1), torch.get_num_threads()
    assert torch.equal(op(x[7:8], -1), whole[7:8])
    assert torch.equal(op(x[:, :50].contiguous(), -1), whole[:, :50])
    assert torch.equal(op(x.flip(0), -1).flip(0), whole)
    assert torch.equal(op(x.t().contiguous(), 0).t(), whole)
    try:
        torch.set_num_threads(1)
        assert torch.equal(op(x, -1), whole)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(op(x.flip(1), -1)[:, -1], whole[:, -1])  # the order can be seen


def test_reference_opcheck_and_gradient():
    x = _x(3, 20, 4)
    bound = 20 * 2.0**-24 * x.abs().double().cumsum(1)
    assert ((SUM(x, 1) - running.running_sum.reference(x, 1)).abs() <= bound).all()
    assert (
        (PRODUCT(x, 1) - running.running_product.reference(x, 1)).abs() <= 20 * 2.0**-24 * x.abs().cumprod(1)
    ).all()
    torch.library.opcheck(running.running_product.overload, (x, 1))
    x.requires_grad_()
    torch.library.opcheck(running.running_sum.overload, (x, 1))
    seed = _x(3, 20, 4, seed=1)
    SUM(x, 1).backward(seed)
    exact = seed.double().flip(1).cumsum(1).flip(1)
    assert (x.grad - exact).abs().max() <= 20 * 2.0**-24 * seed.abs().sum(1).max()


@pytest.mark.parametrize("op", [SUM, PRODUCT])
def test_bad_arguments(op):
    with pytest.raises(ValueError, match="expected dim"):
        op(_x(3, 4), 2)
    with pytest.raises(TypeError, match="expected float32"):
        op(_x(3, 4).double(), 1)
