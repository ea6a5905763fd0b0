"""llm42::index_add: the rows of one place in ascending order, each sum rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm42c.codegen.ops import index_add, registry

registry.load()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _problem(rows: int, places: int, cols: int, dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x, source = torch.randn(places, cols, generator=g), torch.randn(rows, cols, generator=g)
    return x.to(dtype), torch.randint(places, (rows,), generator=g), source.to(dtype)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 40),
    places=st.integers(1, 6),
    cols=st.integers(1, 20),
    dim=st.integers(-2, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_one_row_after_the_other(rows, places, cols, dim, dtype, seed):
    x, index, source = _problem(rows, places, cols, dtype, seed)
    want = x.clone()
    for place, row in zip(index.tolist(), source, strict=True):
        want[place] = want[place] + row
    if dim % 2:
        x, source, want = x.t(), source.t(), want.t()
    assert torch.equal(torch.ops.llm42.index_add(x, dim, index, source), want)


def test_the_order_can_be_seen():
    """The guard: in another order the same rows give other bits."""
    x, index, source = _problem(40, 3, 17, torch.float32)
    forward = torch.ops.llm42.index_add(x, 0, index, source)
    backward = torch.ops.llm42.index_add(x, 0, index.flip(0), source.flip(0))
    assert not torch.equal(forward, backward)
    exact = index_add.index_add.reference(x, 0, index, source)
    size = index_add.index_add.reference(x.abs(), 0, index, source.abs())
    assert ((forward - exact).abs() <= 40 * 2.0**-24 * size).all()


def test_a_place_does_not_see_the_others():
    x, index, source = _problem(40, 5, 17, torch.float32)
    whole = torch.ops.llm42.index_add(x, 0, index, source)
    mine = index == 3
    alone = torch.ops.llm42.index_add(x[3:4], 0, index[mine] - 3, source[mine])
    assert torch.equal(alone[0], whole[3])


def test_opcheck_and_gradients():
    x, index, source = _problem(9, 4, 5, torch.float32)
    x.requires_grad_()
    source.requires_grad_()
    torch.library.opcheck(index_add.index_add.overload, (x, 0, index, source))
    seed = torch.randn(4, 5)
    torch.ops.llm42.index_add(x, 0, index, source).backward(seed)
    assert torch.equal(x.grad, seed)
    assert torch.equal(source.grad, seed[index])


def test_bad_arguments():
    x, index, source = _problem(9, 4, 5, torch.float32)
    with pytest.raises(IndexError, match=r"\[0, 4\)"):
        torch.ops.llm42.index_add(x, 0, index + 4, source)
    with pytest.raises(ValueError, match="expected index"):
        torch.ops.llm42.index_add(x, 0, index[:3], source)
