"""llm42::grouped_outer, and the gradients of grouped_linear that it computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm42c.codegen.ops import grouped_outer, registry

registry.load()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _problem(rows: int, groups: int, n: int, k: int, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, n, generator=g).to(dtype), torch.randn(rows, k, generator=g).to(dtype)
    return a, b, torch.randint(groups, (rows,), generator=g)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 40),
    groups=st.integers(1, 6),
    n=st.integers(1, 20),
    k=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_close_to_the_reference(rows, groups, n, k, dtype, seed):
    a, b, group = _problem(rows, groups, n, k, dtype, seed)
    out = torch.ops.llm42.grouped_outer(a, b, group, groups)
    exact = grouped_outer.grouped_outer.reference(a, b, group, groups)
    size = grouped_outer.grouped_outer.reference(a.abs(), b.abs(), group, groups)
    assert out.shape == exact.shape
    assert out.dtype == dtype
    bound = (rows + 2) * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * exact.abs()
    assert ((out.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()


def test_a_group_does_not_see_the_others():
    a, b, group = _problem(40, 4, 17, 33, torch.float32)
    whole = torch.ops.llm42.grouped_outer(a, b, group, 4)
    mine = group == 2
    alone = torch.ops.llm42.grouped_outer(a[mine], b[mine], group[mine], 4)
    assert torch.equal(alone[2], whole[2])
    assert not torch.equal(alone[1], whole[1])


def test_opcheck_and_bad_arguments():
    a, b, group = _problem(9, 3, 8, 16, torch.float32)
    torch.library.opcheck(grouped_outer.grouped_outer.overload, (a, b, group, 3))
    with pytest.raises(ValueError, match=r"group \[9\] in \[0, 2\)|expected a"):
        torch.ops.llm42.grouped_outer(a, b, torch.full((9,), 2), 2)
    with pytest.raises(ValueError, match="expected a"):
        torch.ops.llm42.grouped_outer(a, b[:3], group, 3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_grouped_linear(transposed, with_bias):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(11, 16, generator=g)
    weight = torch.randn((3, 16, 8) if transposed else (3, 8, 16), generator=g)
    bias = torch.randn(3, 8, generator=g) if with_bias else None
    group = torch.randint(3, (11,), generator=g)
    inputs = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    seed = torch.randn(11, 8, generator=g)
    torch.ops.llm42.grouped_linear(x, weight, bias, group, transposed).backward(seed)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    w = exact[1] if transposed else exact[1].transpose(1, 2)
    y = (exact[0].unsqueeze(1) @ w[group]).squeeze(1)
    (y + exact[2][group] if with_bias else y).backward(seed.double())
    for got, true in zip(inputs, exact, strict=True):
        assert torch.allclose(got.grad.double(), true.grad, rtol=1e-5, atol=1e-5)
        assert true.grad.abs().max() > 0.1
