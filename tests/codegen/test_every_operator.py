"""Every operator that has examples: whoever declares one is tested here, without a row of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import order_bits
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llm42c.codegen import simulate, simulate_attention
from llm42c.codegen.examples import DTYPES, Numbers, for_kernel, for_specification
from llm42c.codegen.operator import Operator
from llm42c.codegen.ops import registry
from llm42c.codegen.order import RUNNING

registry.load()
OPERATORS = order_bits.computing(registry.operators())
# Sequences of 300 positions and vocabularies, which take a simulator many seconds.
LONG = {"dense_attention", "paged_attention", "varlen_attention", "sample"}


def examples(name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    make = OPERATORS[name].examples
    return list(make(Numbers(dtype))) if make else []


def simulated(op: Operator, example: tuple[Any, ...]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """What the simulator of the CPU's order gives, and the arguments, to which it may have written."""
    args = for_specification(example)
    results = op.simulators[op.orders["cpu"]](*args)
    return ([results] if isinstance(results, Tensor) else list(results)), args


def same(name: str, example: tuple[Any, ...]) -> None:
    op, args = OPERATORS[name], for_kernel(example)
    results = op.overload(*args)
    wanted, written = simulated(op, example)
    for result, want in zip([results] if isinstance(results, Tensor) else results, wanted, strict=True):
        assert result.dtype == want.dtype
        assert result.isfinite().all(), "what is no number equals nothing"
        assert torch.equal(result, want)
    names = [a.name for a in op.overload._schema.arguments]
    for changed in op.mutates:
        assert torch.equal(args[names.index(changed)], written[names.index(changed)])


def test_who_has_no_examples_copies_or_needs_ranks() -> None:
    without = registry.operators().keys() - OPERATORS.keys()
    assert all(op.moves or op.traffic for name, op in registry.operators().items() if name in without)
    assert all(op.orders["cpu"] in op.simulators for op in registry.operators().values() if not op.moves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(OPERATORS.keys() - LONG))
def test_kernels_are_the_simulator_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    for example in examples(name, dtype):
        same(name, example)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(LONG))
def test_kernels_are_the_simulator_bit_for_bit_over_many_positions(name: str, dtype: torch.dtype) -> None:
    """The last example, with what was written to; ``test_orders.py`` has digests of all of them."""
    same(name, examples(name, dtype)[-1])


def test_kernels_of_gpus_are_the_simulator_where_their_order_has_one() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(Path(__file__).with_name("interpreted_orders.py"))]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[bool]] = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"embedding_q", "linear_q", "rotary", "running_product", "running_sum"}
    assert all(all(same) and len(same) >= 2 for same in found.values())
    # Guard: a chain from the other end has other bits on these numbers.
    x, dim = examples("running_sum", torch.float32)[0]
    simulator = OPERATORS["running_sum"].simulators[RUNNING]
    assert not torch.equal(simulator(x.flip(dim), dim).select(dim, -1), simulator(x, dim).select(dim, -1))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    args = for_kernel(next(found[-1] for dtype in DTYPES if (found := examples(name, dtype))))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPERATORS[name].overload, args, test_utils=tests)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_have_the_layout_of_results(name: str, dtype: torch.dtype) -> None:
    op = OPERATORS[name]
    for example in examples(name, dtype)[:2]:
        args = for_kernel(example)
        with FakeTensorMode() as mode:
            fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args)
            promised = op.overload(*fakes)
        results = op.overload(*args)
        if isinstance(results, Tensor):
            promised, results = [promised], [results]
        for fake, real in zip(promised, results, strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_another_order_shows_on_the_examples() -> None:
    """k descending; eight lanes; the root and its inverse in one rounding."""
    x, weight, bias = examples("linear_dense", torch.float32)[0]
    found = torch.ops.llm42.linear_dense(x, weight, bias)
    assert torch.equal(found, simulate.linear(x, weight, bias))
    assert not torch.equal(found, simulate.linear(x.flip(-1), weight.flip(-1), bias))
    assert not torch.equal(
        found, torch.nn.functional.linear(x.double(), weight.double(), bias.double()).float()
    )

    rows = examples("row_sum", torch.float32)[0][0]
    total = torch.ops.llm42.row_sum(rows, [-1], True)
    assert torch.equal(total, simulate.lane_sum(rows))
    assert not torch.equal(total, simulate.lanes(rows, torch.add, 8))

    x, factor, eps, *_ = examples("rms_norm", torch.float32)[0]
    normed = torch.ops.llm42.rms_norm(x, factor, eps, 0.0, True)
    mean = simulate.div(simulate.lane_squares(x), x.shape[-1]) + simulate.fp32(eps)
    assert torch.equal(normed, x * simulate.div(1.0, simulate.sqrt(mean)) * factor)
    assert not torch.equal(normed, x * (1 / mean.double().sqrt()).float() * factor)


def test_other_exponentials_and_other_splits_show_on_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    (x,) = examples("row_softmax", torch.float32)[0]
    shifted = x - x.amax(-1, keepdim=True)
    e = shifted.double().exp().float()  # correctly rounded
    assert not torch.equal(torch.ops.llm42.row_softmax(x), simulate.div(e, simulate.lane_sum(e)))

    decode = examples("paged_attention", torch.float32)[1]
    found = torch.ops.llm42.paged_attention(*for_kernel(decode))
    assert torch.equal(found, simulated(OPERATORS["paged_attention"], decode)[0][0])
    monkeypatch.setattr(simulate_attention, "SPLIT", 128)
    assert not torch.equal(found, simulated(OPERATORS["paged_attention"], decode)[0][0])


def test_a_sum_in_fp64_is_no_fused_multiply_add() -> None:
    """Where fp64 lands on the middle of two fp32 numbers, and where the result is denormal."""
    x, y = 8390655.0, 16773123.0  # x · y = 2^47 + 10237
    sign, halves = torch.tensor([1.0, -1.0]), (x * 2.0**-35, y * 2.0**-36)
    for a, b, c, step in (
        (torch.full((2,), halves[0]), sign * halves[1], sign, sign * 2.0**-23),
        (torch.tensor([x * 2.0**-98]), torch.tensor([y * 2.0**-99]), torch.tensor([2.0**-129]), 2.0**-149),
    ):
        assert torch.equal(simulate.fma(a, b, c), c + step)
        assert torch.equal((a.double() * b.double() + c.double()).float(), c)
