"""Collectives in rank order, on real Gloo groups of 2 and 4 ranks and on a group of one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import rank_world
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llm42c.codegen.ops import all_reduce_add_rms_norm as fused
from llm42c.codegen.ops import collectives, registry
from llm42c.codegen.order import RANKS, RANKS_LANES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Fewer rows than ranks, none at all, odd numbers; 700 rows of 96 are too long for one shot.
ROWS = (0, 1, 3, 8, 700)
H = 96
NORMS = ((0.0, True), (1.0, False))  # (weight_offset, cast_first)
in_order = collectives.all_reduce.simulators[RANKS]


def partial(rank: int, rows: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(100 * rows + rank)
    return (torch.randn(1, rows, H, generator=g) * 2 ** (rank % 3)).to(dtype)


def common(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """residual [1, rows, H], weight [H]"""
    g = torch.Generator().manual_seed(rows)
    return torch.randn(1, rows, H, generator=g).to(dtype), 1 + torch.randn(H, generator=g).to(dtype) / 4


def work(rank: int) -> dict[Any, Any]:
    """Everything that the tests look at, on one rank."""
    registry.load()
    ops, size = torch.ops.llm42, dist.get_world_size()
    name = dist.group.WORLD.group_name
    out: dict[Any, Any] = {"name": name}
    for dtype in DTYPES:
        for rows in ROWS:
            x, (residual, weight) = partial(rank, rows, dtype), common(rows, dtype)
            out["all_reduce", dtype, rows] = ops.all_reduce(x, name)
            out["all_gather_last", dtype, rows] = ops.all_gather_last(x, size, name)
            out["shard_last", dtype, rows] = ops.shard_last(residual, size, name)
            shard = ops.shard_rows(residual, size, name)
            out["gather_rows", dtype, rows] = ops.gather_rows(shard, residual, size, name)
            for offset, cast_first in NORMS:
                norm = (weight, 1e-5, offset, cast_first)
                key = (dtype, rows, cast_first)
                out["fused", *key] = ops.all_reduce_add_rms_norm(x, residual, *norm, name)
                out["unfused", *key] = ops.add_rms_norm(ops.all_reduce(x, name), residual, *norm)
                normed, total = ops.all_reduce_add_rms_norm_sharded(x, shard, *norm, size, name)
                out["sharded", *key] = normed, ops.gather_rows(total, residual, size, name)
                out["padding", *key] = total
    x = partial(rank, 3, torch.float32)
    residual, weight = common(3, torch.bfloat16)
    out["cast"] = ops.all_reduce_add_rms_norm(x, residual, weight, 1e-5, 0.0, True, name)
    total = ops.all_reduce(x, name).bfloat16()
    out["cast unfused"] = ops.add_rms_norm(total, residual, weight, 1e-5, 0.0, True)
    strided = partial(rank, 8, torch.float32).transpose(0, 1)
    out["strided"] = ops.all_reduce(strided, name), ops.all_reduce(strided.contiguous(), name)
    ring = partial(rank, 700, torch.float32)
    dist.all_reduce(ring)
    out["ring"] = ring
    out["wrong size"] = _message(lambda: ops.shard_last(residual, 3, name))
    out["wrong name"] = _message(lambda: ops.all_reduce(x, "nobody"))
    return out


def _message(call: Any) -> str:
    try:
        call()
    except (LookupError, ValueError, RuntimeError) as error:
        return str(error)
    return ""


@functools.cache
def world(size: int) -> list[dict[Any, Any]]:
    return rank_world.run(size, work)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(p.dtype == q.dtype and p.shape == q.shape and torch.equal(bits(p), bits(q)) for p, q in pairs)


SIZES = pytest.mark.parametrize("size", [1, 2, 4])


@SIZES
def test_the_sum_is_the_one_in_rank_order_on_every_rank(size: int):
    for dtype in DTYPES:
        for rows in ROWS:
            expected = in_order([partial(r, rows, dtype) for r in range(size)])
            for results in world(size):
                assert same(results["all_reduce", dtype, rows], expected), (dtype, rows)


@SIZES
def test_fused_operators_are_their_simulators_bit_for_bit(size: int):
    op, sharded = fused.all_reduce_add_rms_norm, fused.all_reduce_add_rms_norm_sharded
    for dtype in DTYPES:
        for rows in ROWS:
            xs, (residual, weight) = [partial(r, rows, dtype) for r in range(size)], common(rows, dtype)
            for offset, cast_first in NORMS:
                args = (xs, residual, weight, 1e-5, offset, cast_first)
                expected = op.simulators[RANKS_LANES](*args)
                for rank, results in enumerate(world(size)):
                    assert same(results["fused", dtype, rows, cast_first], expected), (dtype, rows)
                    normed, shard = sharded.simulators[RANKS_LANES](*args, rank)
                    assert same(results["sharded", dtype, rows, cast_first][0], normed), (dtype, rows)
                    assert same(results["padding", dtype, rows, cast_first], shard), (dtype, rows)


def test_the_order_can_be_seen():
    """Control: another order of the same four ranks' values gives other bits, and so does the library's."""
    xs = [partial(r, 700, torch.float32) for r in range(4)]
    expected = in_order(xs)
    assert not torch.equal(in_order(xs[::-1]), expected)
    assert not torch.equal(world(4)[0]["ring"], expected)


@SIZES
def test_the_sum_is_accurate(size: int):
    """n - 1 additions in fp32 and one rounding, each within half an eps of its result."""
    for dtype in DTYPES:
        xs = [partial(r, 700, dtype) for r in range(size)]
        got = world(size)[0]["all_reduce", dtype, 700].double()
        want = collectives.all_reduce_reference(xs)
        size_of = sum(x.double().abs() for x in xs)
        bound = size_of * ((size - 1) * 2.0**-24) + got.abs() * torch.finfo(dtype).eps / 2
        assert bool(((got - want).abs() <= bound).all())


@SIZES
def test_the_fused_operator_has_the_bits_of_the_unfused_graph(size: int):
    for results in world(size):
        for dtype in DTYPES:
            for rows in ROWS:
                for _, cast_first in NORMS:
                    key = (dtype, rows, cast_first)
                    assert same(results["fused", *key], results["unfused", *key]), key
                    assert same(results["sharded", *key], results["unfused", *key]), key
        assert same(results["cast"], results["cast unfused"])
        assert same(*results["strided"])


@SIZES
def test_a_residual_shard_holds_the_own_rows_and_zeros(size: int):
    for rank, results in enumerate(world(size)):
        for rows in ROWS:
            key = (torch.bfloat16, rows, True)
            whole = results["unfused", *key][1]
            expected = collectives.shard_rows_reference(whole, size, rank)
            assert same(results["padding", *key], expected), (rank, rows)


@SIZES
def test_data_movement(size: int):
    for rank, results in enumerate(world(size)):
        for dtype in DTYPES:
            for rows in ROWS:
                residual = common(rows, dtype)[0]
                xs = [partial(r, rows, dtype) for r in range(size)]
                assert same(results["all_gather_last", dtype, rows], torch.cat(xs, -1))
                assert same(results["shard_last", dtype, rows], residual.chunk(size, -1)[rank].contiguous())
                assert same(results["gather_rows", dtype, rows], residual)


def test_rows_do_not_depend_on_the_rows_beside_them():
    """The first rows of a long message, alone: the same bits in one shot as in two."""
    rows = [partial(r, 700, torch.bfloat16)[:, :3] for r in range(4)]
    assert same(in_order(rows), world(4)[0]["all_reduce", torch.bfloat16, 700][:, :3])


@SIZES
def test_a_wrong_group_is_an_error(size: int):
    for results in world(size):
        assert "3 ranks" in results["wrong size"] or "for 3" in results["wrong size"]
        assert "no process group 'nobody'" in results["wrong name"]


@pytest.mark.parametrize("size", [2, 4])
def test_fakes(size: int):
    """Shapes, dtypes and strides of the fakes are those of the results; no group is needed for them."""
    registry.define()
    ops = torch.ops.llm42
    results = world(size)[0]
    for dtype in DTYPES:
        for rows in ROWS:
            with FakeTensorMode() as mode:
                x = mode.from_tensor(partial(0, rows, dtype))
                residual, weight = (mode.from_tensor(t) for t in common(rows, dtype))
                norm = (weight, 1e-5, 0.0, True)
                shard = ops.shard_rows(residual, size, "g")
                key = (dtype, rows)
                pairs = [
                    (ops.all_reduce(x, "g"), results["all_reduce", *key]),
                    (ops.all_gather_last(x, size, "g"), results["all_gather_last", *key]),
                    (ops.shard_last(x, size, "g"), results["shard_last", *key]),
                    (ops.gather_rows(shard, x, size, "g"), results["gather_rows", *key]),
                    (
                        ops.all_reduce_add_rms_norm_sharded(x, shard, *norm, size, "g")[1],
                        results["padding", dtype, rows, True],
                    ),
                    *zip(
                        ops.all_reduce_add_rms_norm(x, residual, *norm, "g"),
                        results["fused", dtype, rows, True],
                        strict=True,
                    ),
                ]
            for fake, real in pairs:
                assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_what_the_fakes_refuse():
    registry.define()
    ops = torch.ops.llm42
    with FakeTensorMode():
        with pytest.raises(ValueError, match=r"not torch\.int64"):
            ops.all_reduce(torch.zeros(3, dtype=torch.int64), "g")
        with pytest.raises(ValueError, match="cannot be divided among 4"):
            ops.shard_last(torch.zeros(2, 6), 4, "g")


def test_the_reference_of_the_fused_operator():
    xs = [partial(r, 3, torch.float32) for r in range(2)]
    residual, weight = common(3, torch.float32)
    normed, total = world(2)[0]["fused", torch.float32, 3, True]
    want, want_total = fused.all_reduce_add_rms_norm.reference(xs, residual, weight, 1e-5, 0.0, True)
    eps = 2.0**-23
    size_of = sum(x.double().abs() for x in xs) + residual.double().abs()
    assert bool(((total.double() - want_total).abs() <= 2 * eps * size_of).all())
    # Relative: the sum of H squares, root, two products; plus what the errors of total make of it.
    bound = (H + 8) * eps * (want.abs() + size_of / want_total.square().mean(-1, keepdim=True).sqrt())
    assert bool(((normed.double() - want).abs() <= bound * 2).all())
