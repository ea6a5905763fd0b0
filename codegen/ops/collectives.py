"""Collectives of a tensor-parallel group with one fixed result: a sum in rank order, and data movement.

A ring or tree all-reduce adds the ranks' values in an order that depends on the message's size and on where
an element stands in it. Here element i of the sum is

    round(((x_0[i] + x_1[i]) + x_2[i]) + …)        x_r in fp32, ranks ascending, one rounding to x's dtype

whatever the size, so a row's bits do not depend on the rows that travel with it, and every rank holds the
same bits.

A group is named, as in torch's functional collectives; the ranks of a group must call with equal shapes.
Where a shape depends on the group's size, the size is an argument, so that fakes need no group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.operator import Tokens, Traffic, operator
from llm42c.codegen.order import COPY, RANKS

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require_float(x: Tensor) -> None:
    """Raise ValueError for a dtype that is not summed."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"sums over ranks are of float32, bfloat16 or float16, not {x.dtype}")


def on_group(function: str, symmetric: bool = False) -> Callable[..., Any]:
    """The implementation by process-group calls, imported by the first call.

    With ``symmetric`` there is a kernel for GPUs too, which takes the groups that were enabled for it. The
    group's name is the last argument.
    """

    def call(*args: Any) -> Any:
        if symmetric and args[0].is_cuda:
            from llm42c.codegen.triton import symmetric as kernels

            if kernels.enabled(args[-1]):
                return getattr(kernels, function)(*args)
        from llm42c.codegen.dist import collectives

        return getattr(collectives, function)(*args)

    return call


def chunk_rows(rows: Any, group_size: int) -> Any:
    """Rows a rank owns: rank r has rows ``[r * chunk, (r + 1) * chunk)``, cut at the end."""
    return (rows + group_size - 1) // group_size


def _rows(x: Tensor) -> Any:
    return x.numel() // x.shape[-1]


@operator(orders={"cpu": RANKS, "cuda": RANKS}, tokens=Tokens.POINTWISE, traffic=Traffic.SUM)
def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """x: any shape, the ranks' partial sums → their sum, the same bits on every rank."""
    raise NotImplementedError("a collective's specification takes the tensors of all ranks")


@all_reduce.specification
def all_reduce_reference(xs: Sequence[Tensor]) -> Tensor:
    """The sum of the ranks' tensors in fp64."""
    return torch.stack([x.double() for x in xs]).sum(0)


@all_reduce.simulator(RANKS)
def all_reduce_simulated(xs: Sequence[Tensor]) -> Tensor:
    """The same on every rank."""
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


@all_reduce.fake
def _all_reduce_fake(x: Tensor, group_name: str) -> Tensor:
    require_float(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator(orders={"cpu": COPY, "cuda": COPY}, tokens=Tokens.ROWS, traffic=Traffic.GATHER)
def all_gather_last(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """x: [..., N] of each rank → [..., N * group_size], ranks ascending."""
    raise NotImplementedError("a collective's specification takes the tensors of all ranks")


@all_gather_last.specification
def _all_gather_last_reference(xs: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(xs), dim=-1)


@all_gather_last.fake
def _all_gather_last_fake(x: Tensor, group_size: int, group_name: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] * group_size))


@operator(orders={"cpu": COPY, "cuda": COPY}, tokens=Tokens.ROWS)
def shard_last(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """x: [..., N] → this rank's [..., N / group_size] columns."""
    raise NotImplementedError("a collective's specification takes the tensors of all ranks")


@shard_last.specification
def _shard_last_reference(x: Tensor, group_size: int, rank: int) -> Tensor:
    return x.chunk(group_size, -1)[rank]


@shard_last.fake
def _shard_last_fake(x: Tensor, group_size: int, group_name: str) -> Tensor:
    if x.shape[-1] % group_size:
        raise ValueError(f"{x.shape[-1]} columns cannot be divided among {group_size} ranks")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // group_size))


@operator(orders={"cpu": COPY, "cuda": COPY})
def shard_rows(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """x: [..., H] of R rows → this rank's [ceil(R / group_size), H]; rows past the end are zero."""
    raise NotImplementedError("a collective's specification takes the tensors of all ranks")


@shard_rows.specification
def shard_rows_reference(x: Tensor, group_size: int, rank: int) -> Tensor:
    """The rows of ``rank``, zeros where there are none."""
    rows = x.reshape(-1, x.shape[-1])
    chunk = chunk_rows(len(rows), group_size)
    own = rows[rank * chunk : (rank + 1) * chunk]
    return torch.cat([own, own.new_zeros(chunk - len(own), x.shape[-1])])


@shard_rows.fake
def _shard_rows_fake(x: Tensor, group_size: int, group_name: str) -> Tensor:
    return x.new_empty((chunk_rows(_rows(x), group_size), x.shape[-1]))


@operator(orders={"cpu": COPY, "cuda": COPY}, traffic=Traffic.GATHER)
def gather_rows(shard: Tensor, like: Tensor, group_size: int, group_name: str) -> Tensor:
    """shard: [ceil(R / group_size), H] of each rank → the R rows, in the shape of ``like``."""
    raise NotImplementedError("a collective's specification takes the tensors of all ranks")


@gather_rows.specification
def _gather_rows_reference(shards: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(list(shards))[: _rows(like)].reshape(like.shape)


@gather_rows.fake
def _gather_rows_fake(shard: Tensor, like: Tensor, group_size: int, group_name: str) -> Tensor:
    return torch.empty_like(like, dtype=shard.dtype, memory_format=torch.contiguous_format)


all_reduce.implementation("cpu", "cuda")(on_group("all_reduce", symmetric=True))
all_gather_last.implementation("cpu", "cuda")(on_group("all_gather_last"))
shard_last.implementation("cpu", "cuda")(on_group("shard_last"))
shard_rows.implementation("cpu", "cuda")(on_group("shard_rows"))
gather_rows.implementation("cpu", "cuda")(on_group("gather_rows"))
