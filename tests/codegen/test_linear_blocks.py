"""Products in the order of AMX, by vectors or by AMX itself: the same bits."""

from __future__ import annotations

import pytest
import torch

from llm42c.codegen.examples import Numbers
from llm42c.codegen.ops import linear as chains
from llm42c.codegen.ops import linear_blocks as blocks
from llm42c.codegen.ops import registry


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    registry.load()


def tensors(m: int, n: int, k: int, tiny: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [m, k], w: [n, k]. The first product of each sum is large and the last one takes it away, so that
    the roundings in between show in what is left."""
    r = Numbers(torch.bfloat16)
    scale = 2.0**-63 if tiny else 1.0  # products then stand around the least normal number
    x, w = r(m, k, scale=scale), r(n, k, scale=scale)
    if k > 2:
        x[:, 0] *= 2.0**16
        x[:, -1], w[:, -1] = x[:, 0], -w[:, 0]
    return x, w


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64, 100, 577])
def test_the_kernel_is_the_simulator(k: int, tiny: bool) -> None:
    """Of any k; rows and columns fill tiles, parts of tiles, and more than one."""
    for m, n in ((1, 5), (17, 49), (40, 8)):
        x, w = tensors(m, n, k, tiny)
        y = torch.ops.llm42.linear_blocks(x, torch.ops.llm42.linear_pack(w), None, n)
        assert torch.equal(y, blocks.linear_blocks.simulators[blocks.TWO_CHAINS](x, w, None, n))


@pytest.mark.parametrize("k", [64, 96, 577])
def test_guard_these_numbers_show_the_order(k: int) -> None:
    x, w = tensors(17, 49, k)
    packed = torch.ops.llm42.linear_pack(w)
    in_blocks = torch.ops.llm42.linear_blocks(x, packed, None, 49)
    assert not torch.equal(in_blocks, torch.ops.llm42.linear(x, packed, None, 49))


@pytest.mark.parametrize("k", [96, 577])
def test_a_row_does_not_see_the_others(k: int) -> None:
    """The number of rows decides over tiles, threads and blocks of k, and over no bit."""
    x, w = tensors(300, 100, k)
    packed = torch.ops.llm42.linear_pack(w)
    whole = torch.ops.llm42.linear_blocks(x, packed, None, 100)
    for first, count in ((0, 1), (3, 7), (5, 16), (2, 33), (40, 70), (100, 200)):
        part = torch.ops.llm42.linear_blocks(x[first : first + count], packed, None, 100)
        assert torch.equal(part, whole[first : first + count])


def test_what_is_no_number_stays_in_its_row_and_column() -> None:
    x, w = tensors(20, 50, 70)
    packed = torch.ops.llm42.linear_pack(w)
    clean = torch.ops.llm42.linear_blocks(x, packed, None, 50)
    x[3, 69], w[7, 1] = torch.inf, torch.nan
    y = torch.ops.llm42.linear_blocks(x, torch.ops.llm42.linear_pack(w), None, 50)
    others = [i for i in range(20) if i != 3]
    columns = [j for j in range(50) if j != 7]
    assert not y[3].isfinite().any()
    assert y[:, 7].isnan().all()
    assert torch.equal(y[others][:, columns], clean[others][:, columns])


def test_fused_products_are_their_parts_bit_for_bit() -> None:
    x, w = tensors(19, 96, 70)
    packed = torch.ops.llm42.linear_pack(w)
    y = torch.ops.llm42.linear_blocks(x, packed, None, 96)
    assert torch.equal(torch.ops.llm42.linear_silu_mul_blocks(x, packed, 48), torch.ops.llm42.silu_mul(y))
    residual = y.flip(0)
    assert torch.equal(torch.ops.llm42.linear_add_blocks(x, packed, None, residual, 96), residual + y)


def test_other_dtypes_are_refused() -> None:
    x = torch.ones(2, 32)
    packed = torch.ops.llm42.linear_pack(torch.ones(8, 32))
    with pytest.raises(TypeError, match="linear_blocks: expected bfloat16"):
        torch.ops.llm42.linear_blocks(x, packed, None, 8)


def test_accuracy_is_no_worse_than_that_of_a_chain() -> None:
    """Against fp64: K + 1 roundings of partial sums at most, each relative to the sum of magnitudes."""
    x, w = tensors(16, 48, 577)
    packed = torch.ops.llm42.linear_pack(w)
    exact, magnitude = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    bound = 578 * torch.finfo(torch.float32).eps * magnitude + torch.finfo(torch.bfloat16).eps * exact.abs()
    for order in (torch.ops.llm42.linear, torch.ops.llm42.linear_blocks):
        assert ((order(x, packed, None, 48).double() - exact).abs() <= bound).all()


def test_the_operators_are_those_of_chains_but_for_the_order() -> None:
    for name in ("linear", "linear_silu_mul", "linear_add"):
        ours, other = getattr(chains, name), getattr(blocks, f"{name}_blocks")
        assert ours.schema.split("(", 1)[1] == other.schema.split("(", 1)[1]
