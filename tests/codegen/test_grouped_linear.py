"""llm42::grouped_linear: each row is linear_dense on its own group's weight, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm42c.codegen.ops import grouped_linear, registry

registry.load()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _problem(rows: int, groups: int, n: int, k: int, dtype: torch.dtype, transposed: bool, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g).to(dtype)
    shape = (groups, k, n) if transposed else (groups, n, k)
    weight = (torch.randn(shape, generator=g) / k**0.5).to(dtype)
    bias = torch.randn(groups, n, generator=g).to(dtype)
    return x, weight, bias, torch.randint(groups, (rows,), generator=g)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    groups=st.integers(1, 6),
    n=st.integers(1, 70),
    k=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_row_is_the_dense_product_of_its_group(rows, groups, n, k, dtype, transposed, with_bias, seed):
    x, weight, bias, group = _problem(rows, groups, n, k, dtype, transposed, seed)
    b = bias if with_bias else None
    out = torch.ops.llm42.grouped_linear(x, weight, b, group, transposed)
    assert out.shape == (rows, n)
    for i, e in enumerate(group.tolist()):
        w = weight[e].t() if transposed else weight[e]
        alone = torch.ops.llm42.linear_dense(x[i : i + 1], w, bias[e] if with_bias else None)
        assert torch.equal(out[i], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_the_reference(dtype):
    x, weight, bias, group = _problem(33, 4, 50, 64, dtype, False)
    out = torch.ops.llm42.grouped_linear(x, weight, bias, group, False)
    exact = grouped_linear.grouped_linear.reference(x, weight, bias, group, False)
    size = grouped_linear.grouped_linear.reference(x.abs(), weight.abs(), bias.abs(), group, False)
    eps32, eps = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    # 64 fused multiply-adds and the bias in fp32, one rounding to dtype.
    assert ((out.double() - exact).abs() <= 66 * eps32 * size + eps * exact.abs()).all()
    assert not torch.equal(out.double(), exact)


def test_opcheck():
    for transposed in (False, True):
        x, weight, bias, group = _problem(5, 3, 8, 16, torch.float32, transposed)
        torch.library.opcheck(grouped_linear.grouped_linear.overload, (x, weight, bias, group, transposed))
        torch.library.opcheck(grouped_linear.grouped_linear.overload, (x, weight, None, group, transposed))


def test_strided_input_and_threads():
    x, weight, bias, group = _problem(40, 4, 50, 32, torch.bfloat16, True)
    wide = torch.zeros(40, 64, dtype=x.dtype)
    wide[:, 8:40] = x
    whole = torch.ops.llm42.grouped_linear(x, weight, bias, group, True)
    assert torch.equal(torch.ops.llm42.grouped_linear(wide[:, 8:40], weight, bias, group, True), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(torch.ops.llm42.grouped_linear(x, weight, bias, group, True), whole)
    finally:
        torch.set_num_threads(threads)


def test_bad_arguments():
    x, weight, bias, group = _problem(4, 3, 8, 16, torch.float32, False)
    with pytest.raises(ValueError, match=r"group 3 is outside of \[0, 3\)"):
        torch.ops.llm42.grouped_linear(x, weight, bias, torch.tensor([0, 1, 3, 2]), False)
    with pytest.raises(ValueError, match="expected x"):
        torch.ops.llm42.grouped_linear(x, weight, bias, group, True)
    with pytest.raises(TypeError, match="dtype"):
        torch.ops.llm42.grouped_linear(x, weight.bfloat16(), bias, group, False)
    with pytest.raises(ValueError, match="expected group"):
        torch.ops.llm42.grouped_linear(x, weight, bias, group[:2], False)
