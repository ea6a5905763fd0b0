"""All-reduce, residual addition and RMSNorm as one operator: what joins the halves of a decoder layer.

In a tensor-parallel decoder each rank holds a partial sum x_r of the attention's (or the MLP's) output:

    s      = round(((x_0 + x_1) + x_2) + …)      fp32, ranks ascending, rounded to x's dtype
    total  = round(residual + s)                 in residual's dtype
    normed = rms_norm(total)                     as ``llm42::rms_norm``, rounding where it rounds

These are the roundings of the unfused graph ``llm42::all_reduce`` → (cast) → ``llm42::add_rms_norm``, so
the fused operator has its bits, for any number of rows. x and residual may differ in dtype: s is then cast
to the residual's.

Two forms of the residual:

``all_reduce_add_rms_norm``            every rank holds all rows of the residual; s travels, each rank norms
                                       all rows.
``all_reduce_add_rms_norm_sharded``    rank r holds rows ``[r * chunk, (r + 1) * chunk)`` of it, chunk =
                                       ceil(R / group size), rows past the end zero; each rank reduces, adds
                                       and norms its own rows, and only normed travels back. Addition and
                                       norm cost 1 / group size, and the residual's memory too. The next
                                       layer takes the shard as it is. (The scheme of TokenWeave, MLSys 2026,
                                       section 3.)

A row's arithmetic is the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.operator import Tokens, Traffic, operator
from llm42c.codegen.ops.collectives import (
    all_reduce_reference,
    all_reduce_simulated,
    chunk_rows,
    on_group,
    require_float,
    shard_rows_reference,
)
from llm42c.codegen.ops.norm import add_rms_norm_simulated, rms_norm
from llm42c.codegen.order import RANKS_LANES, RANKS_TREE


@operator(orders={"cpu": RANKS_LANES, "cuda": RANKS_TREE}, tokens=Tokens.ROWS, traffic=Traffic.SUM)
def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_first: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """x: [..., H]; residual: x's shape; weight: [H] → (normed, total), both of the residual's shape and
    dtype.
    """
    raise NotImplementedError("a collective's specification takes the tensors of all ranks")


@all_reduce_add_rms_norm.specification
def reference(
    xs: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    """(normed, total) in fp64 from all ranks' x, without any rounding."""
    total = all_reduce_reference(xs) + residual.double()
    return rms_norm.reference(total, weight, eps, weight_offset, cast_first), total


@all_reduce_add_rms_norm.simulator(RANKS_LANES)
def _simulated(
    xs: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    x = all_reduce_simulated(xs).to(residual.dtype)
    return add_rms_norm_simulated(x, residual, weight, eps, weight_offset, cast_first)


@all_reduce_add_rms_norm.fake
def _fake(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    require_float(x)
    total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return torch.empty_like(total), total


@operator(orders={"cpu": RANKS_LANES, "cuda": RANKS_TREE}, traffic=Traffic.SUM)
def all_reduce_add_rms_norm_sharded(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_first: bool,
    group_size: int,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """x: [..., H] of R rows; residual: [ceil(R / group_size), H] → (normed [..., H], total of the
    residual's shape).
    """
    raise NotImplementedError("a collective's specification takes the tensors of all ranks")


@all_reduce_add_rms_norm_sharded.specification
def _sharded_reference(xs: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    """As :func:`reference`, from the whole residual, and with the rank last; total is the rank's shard."""
    normed, total = reference(xs, *options[:-1])
    return normed, shard_rows_reference(total, len(xs), options[-1])


@all_reduce_add_rms_norm_sharded.simulator(RANKS_LANES)
def _sharded_simulated(xs: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    normed, total = _simulated(xs, *options[:-1])
    return normed, shard_rows_reference(total, len(xs), options[-1])


@all_reduce_add_rms_norm_sharded.fake
def _sharded_fake(x: Tensor, residual: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    group_size = options[-2]
    require_float(x)
    normed = torch.empty_like(x, dtype=residual.dtype, memory_format=torch.contiguous_format)
    rows = chunk_rows(x.numel() // x.shape[-1], group_size)
    return normed, residual.new_empty((rows, x.shape[-1]))


all_reduce_add_rms_norm.implementation("cpu", "cuda")(on_group("all_reduce_add_rms_norm", symmetric=True))
all_reduce_add_rms_norm_sharded.implementation("cpu", "cuda")(
    on_group("all_reduce_add_rms_norm_sharded", symmetric=True)
)
