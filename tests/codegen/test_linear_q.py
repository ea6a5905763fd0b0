"""Products with quantised weights: the simulator's bits on every instruction set, for every row by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_quant import random_blocks
from torch import Tensor

from llm42c.codegen import quant, simulate
from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry
from llm42c.codegen.ops.linear_q import embedding_q, linear_q
from llm42c.codegen.order import GROUPS

registry.load()
ops = torch.ops.llm42
ISAS = build.ISAS
simulated = linear_q.simulators[GROUPS]


def weight(name: str, n: int, k: int = 512, seed: int = 0) -> Tensor:
    blocks = random_blocks(name, n, k // quant.format_of(name).block, seed)
    return quant.pack(quant.split(blocks, name), name)


def x_of(m: int, k: int = 512, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(x: Tensor, packed: Tensor, name: str, n: int) -> Tensor:
    return ops.linear_q(x, [packed], name, [n], None, None, False)


def extremes(name: str, n: int = 20, k: int = 512) -> tuple[Tensor, Tensor]:
    """Rows whose integers are all ±127, and weights whose integers are all the largest, or the smallest."""
    form = quant.format_of(name)
    values = quant.unpack(weight(name, n, k), name, n)
    values.q[: n // 2] = 2**form.bits - 1
    values.q[n // 2 : n // 2 + 4] = 0
    x = torch.ones(6, k)
    x[1] = -1
    x[2, ::2] = -1
    x[3] = 2.0**-119  # the least that counts
    x[4] = 2.0**-119 * (1 - 2.0**-24)
    x[5, ::32] = 3e38
    return x, quant.pack(values, name)


@pytest.mark.parametrize("name", quant.FORMATS)
def test_is_the_simulator_also_at_the_ends_of_the_integers(name: str) -> None:
    x, packed = extremes(name)
    y = product(x, packed, name, 20)
    assert torch.equal(y, simulated(x, [packed], name, [20], None, None, False))
    pairs = 127 * quant.unpack(packed, name, 20).q[0].long().view(-1, 2).sum(
        -1
    )  # of bytes, as they are stored
    assert bool((pairs > 2**15 - 1).any()) == (name == "q8_0"), "these would saturate in sixteen bits"
    assert y[0].isfinite().all()
    assert torch.equal(y[4], torch.zeros(20))
    assert not torch.equal(y[3], torch.zeros(20))


@pytest.mark.slow
def test_bits_are_those_of_every_instruction_set(digest_on: Callable[[str, str], str]) -> None:
    code = """
    from test_linear_q import extremes, product, quant, weight, x_of
    found = []
    for name in quant.FORMATS:
        for m in (1, 2, 3, 5, 8, 9, 31):
            found.append(product(x_of(m, dtype=torch.bfloat16), weight(name, 100), name, 100))
        found.append(product(*extremes(name), name, 20))
    print(digest(*found))
    """
    isas = [isa for isa in ISAS if not build.NEEDS.get(isa, set()) - set(build.cpu_features().split())]
    assert len({digest_on(isa, code) for isa in isas}) == 1
    assert digest_on(
        build.widest_isa(), code.replace("weight(name, 100)", "weight(name, 100, seed=1)")
    ) != digest_on(build.widest_isa(), code)


@pytest.mark.parametrize("name", quant.FORMATS)
def test_a_row_is_by_itself(name: str) -> None:
    packed = weight(name, 100)
    x = x_of(300, dtype=torch.bfloat16)
    whole = product(x, packed, name, 100)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 10), slice(100, 133), slice(299, 300)):
        assert torch.equal(product(x[rows], packed, name, 100), whole[rows])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(product(x[order], packed, name, 100), whole[order])
    assert not torch.equal(whole[order], whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(product(x, packed, name, 100), whole)
            assert torch.equal(product(x[:5], packed, name, 100), whole[:5])
    finally:
        torch.set_num_threads(threads)


def test_columns_stand_by_themselves_whatever_stands_beside_them() -> None:
    names, sizes = ["q4_k", "q8_0", "q5_0", "q6_k"], [40, 17, 16, 3]
    packed = [weight(name, n) for name, n in zip(names, sizes, strict=True)]
    x = x_of(9, dtype=torch.bfloat16)
    together = ops.linear_q(x, packed, ",".join(names), sizes, None, None, False)
    apart = [product(x, p, name, n) for p, name, n in zip(packed, names, sizes, strict=True)]
    assert torch.equal(together, torch.cat(apart, -1))


def test_the_chain_s_order_shows() -> None:
    """Guard: the groups from the other end, and x with one scale a row, have other bits."""
    x, packed = x_of(9), weight("q4_0", 100)
    y = product(x, packed, "q4_0", 100)
    turned = quant.unpack(packed, "q4_0", 100)
    blocks = turned.q.view(100, -1, 32).flip(1).reshape(100, -1)
    descending = quant.pack(quant.Values(blocks, turned.outer.flip(1)), "q4_0")
    other = product(x.view(9, -1, 32).flip(1).reshape(9, -1), descending, "q4_0", 100)
    assert (y != other).double().mean() > 0.3
    coarse, scale = simulate.integers(x, 512)
    assert not torch.equal(y, product(coarse * scale, packed, "q4_0", 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", quant.FORMATS)
def test_within_the_bound_of_eight_bits(name: str, dtype: torch.dtype) -> None:
    """Each value of x is off by half a unit of its step, the chain and the result by their roundings."""
    packed, x = weight(name, 48), x_of(11, dtype=dtype) / 64
    values = quant.dequantise(quant.unpack(packed, name, 48), name).double() / 2**10
    packed = quant.pack(_scaled(quant.unpack(packed, name, 48)), name)
    y = product(x, packed, name, 48).double()
    exact = linear_q.reference(x, [packed], name, [48], None, None, False)
    unit = x.double().unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1) / 127
    size = values.abs()
    bound = (unit / 2 * (1 + 2**-20)) @ size.T + 64 * 2**-24 * (x.double().abs() + unit) @ (4 * size).T
    bound = bound + exact.abs() * torch.finfo(dtype).eps + 64 * 2**-24 * 2**9
    assert ((y - exact).abs() <= bound).all()
    assert (y - exact).abs().max() > 0


def _scaled(v: quant.Values) -> quant.Values:
    """Scales 2^10 times smaller, so that results fit fp16."""
    small = None if v.outer_minimum is None else v.outer_minimum / 2**10
    return quant.Values(v.q, v.outer / 2**10, small, v.inner, v.inner_minimum)


def test_what_is_no_number_stays_in_its_row() -> None:
    x, packed = x_of(9), weight("q5_1", 100)
    clean = product(x, packed, "q5_1", 100)
    x[2, 7], x[4, 9], x[5, 0] = torch.nan, torch.inf, -torch.inf
    y = product(x, packed, "q5_1", 100)
    assert y[[2, 4, 5]].isnan().all()
    assert torch.equal(y[[0, 1, 3, 6, 7, 8]], clean[[0, 1, 3, 6, 7, 8]])


def test_other_strides_and_empty_shapes() -> None:
    x, packed = x_of(8), weight("q4_0", 100)
    y = product(x, packed, "q4_0", 100)
    wide = torch.randn(8, 700)
    wide[:, 100:612] = x
    assert torch.equal(product(wide[:, 100:612], packed, "q4_0", 100), y)
    assert torch.equal(
        product(x.view(2, 4, 512).transpose(0, 1), packed, "q4_0", 100).transpose(0, 1).reshape(8, 100), y
    )
    assert product(x[0], packed, "q4_0", 100).shape == (100,)
    assert product(x[:0], packed, "q4_0", 100).shape == (0, 100)
    assert ops.embedding_q(
        torch.empty(0, 3, dtype=torch.int64), packed, "q4_0", 100, 512, torch.float32
    ).shape == (0, 3, 512)


@pytest.mark.parametrize("name", quant.FORMATS)
def test_rows_are_dequantised(name: str) -> None:
    packed, ids = weight(name, 40), torch.tensor([39, 0, 17, 17], dtype=torch.int32)
    rows = ops.embedding_q(ids, packed, name, 40, 512, torch.float32)
    assert torch.equal(rows, embedding_q.reference(ids, packed, name, 40, 512, torch.float32))
    assert not torch.equal(rows[0], rows[1])


def _call(**changes: Any) -> Tensor:
    given: dict[str, Any] = {
        "x": x_of(2), "packed": [weight("q4_0", 40)], "formats": "q4_0", "sizes": [40],
        "bias": None, "residual": None, "gated": False,
    }  # fmt: skip
    return ops.linear_q(*(given | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": "q2_k"}, "no kernel for weights of format 'q2_k'"),
        ({"formats": ""}, "no kernel for weights of format ''"),
        ({"formats": "q4_0,q4_0"}, "more formats than weights"),
        ({"sizes": []}, "expected a size for each of the 1 weights, got 0"),
        ({"sizes": [-1]}, "must not be negative"),
        ({"sizes": [49]}, r"expected a weight \[49, 512\] of format q4_0"),
        ({"formats": "q4_1"}, r"expected a weight \[40, 512\] of format q4_1"),
        ({"x": torch.zeros(2, 100)}, "rows of 100 values are no multiple of the 32 of a block of q4_0"),
        ({"x": torch.zeros(2, 512).double()}, "expected float32, bfloat16 or float16"),
        ({"packed": [torch.zeros(3, 16, 288)]}, "dtype uint8"),
        ({"bias": torch.zeros(39)}, r"expected bias \[40\]"),
        ({"bias": torch.zeros(40).half()}, "bias of dtype"),
        ({"residual": torch.zeros(2, 41)}, r"expected residual \[2, 40\]"),
        ({"gated": True}, "gated takes two weights of one size"),
    ],
)
def test_errors_say_what_was_expected(changes: dict[str, Any], message: str) -> None:
    assert _call().shape == (2, 40)
    with pytest.raises((ValueError, TypeError), match=message):
        _call(**changes)


def test_a_row_that_is_not_there() -> None:
    for index in (-1, 40):
        with pytest.raises(IndexError, match=f"index {index} is out of range for 40 rows"):
            ops.embedding_q(torch.tensor([0, index]), weight("q4_0", 40), "q4_0", 40, 512, torch.float32)
