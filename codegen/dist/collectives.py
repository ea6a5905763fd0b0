"""Rank-ordered collectives by process-group calls. Semantics: ``codegen/ops/collectives.py``.

One shot: all ranks' tensors are gathered and every rank adds them. Two shots: each rank receives its own
rows of all ranks, adds them, and the sums are gathered. The bits are the same. Two shots move
2 (n - 1) / n of a message instead of n - 1 of them, and pay the latency twice; which is taken depends on
sizes alone, so that all ranks agree.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm42c.codegen.ops.collectives import chunk_rows

ONE_SHOT_BYTES = 128 * 1024  # of one rank's message
_PAIR = 2


def group_of(group_name: str) -> dist.ProcessGroup:
    """The process group of that name. Raises LookupError where this process has none."""
    names: Any = dist.distributed_c10d
    try:
        group: dist.ProcessGroup = names._resolve_process_group(group_name)
    except (RuntimeError, ValueError) as error:
        raise LookupError(
            f"no process group {group_name!r} in this process: torch.distributed must be initialised first"
        ) from error
    return group


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """``llm42::all_reduce``."""
    group = group_of(group_name)
    if _takes_one_shot(x, group.size()):
        return ordered_sum(_gather(x, group))
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    return _gather_chunks(_reduce_own_rows(rows, group), len(rows), group).view(x.shape)


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    cast_first: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """``llm42::all_reduce_add_rms_norm``."""
    total = all_reduce(x, group_name).to(residual.dtype)
    return _add_rms_norm(total, residual, weight, eps, weight_offset, cast_first)


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
    """``llm42::all_reduce_add_rms_norm_sharded``."""
    group = _sized(group_name, group_size)
    rows = x.reshape(-1, x.shape[-1])
    own = _reduce_own_rows(rows, group).to(residual.dtype)
    normed, total = _add_rms_norm(own, residual[: len(own)], weight, eps, weight_offset, cast_first)
    return _gather_chunks(normed, len(rows), group).view(x.shape), _padded(total, len(residual))


def all_gather_last(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """``llm42::all_gather_last``."""
    parts = _gather(x, _sized(group_name, group_size))  # [n, ..., N]
    columns = parts.movedim(0, -2).reshape(*x.shape[:-1], group_size * x.shape[-1])
    return columns.clone(memory_format=torch.contiguous_format)


def shard_last(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """``llm42::shard_last``."""
    rank, width = _sized(group_name, group_size).rank(), x.shape[-1] // group_size
    part = x.narrow(-1, rank * width, width)
    return part.clone(memory_format=torch.contiguous_format)


def shard_rows(x: Tensor, group_size: int, group_name: str) -> Tensor:
    """``llm42::shard_rows``."""
    rank, rows = _sized(group_name, group_size).rank(), x.reshape(-1, x.shape[-1])
    chunk = chunk_rows(len(rows), group_size)
    own = rows[rank * chunk : (rank + 1) * chunk]
    return own.clone() if len(own) == chunk else _padded(own, chunk)


def gather_rows(shard: Tensor, like: Tensor, group_size: int, group_name: str) -> Tensor:
    """``llm42::gather_rows``."""
    rows = like.numel() // like.shape[-1]
    return _gather_chunks(shard, rows, _sized(group_name, group_size)).view(like.shape)


def gather_into(parts: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    """parts: [n * N] ← the ranks' x: [N], ascending."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch < 2.13
    gather(parts, x, group=group)


def ordered_sum(parts: Tensor) -> Tensor:
    """The sum over the first dimension in ascending order, in fp32, rounded once. Destroys ``parts``."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == _PAIR:  # a sum of two is computed in fp32 and rounded once in any dtype
        return parts[0] + parts[1]
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def _takes_one_shot(x: Tensor, size: int) -> bool:
    return size <= _PAIR or x.numel() * x.element_size() <= ONE_SHOT_BYTES


def _sized(group_name: str, group_size: int) -> dist.ProcessGroup:
    group = group_of(group_name)
    if group.size() != group_size:
        raise ValueError(
            f"process group {group_name!r} has {group.size()} ranks, the graph was made for {group_size}"
        )
    return group


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    both: tuple[Tensor, Tensor] = torch.ops.llm42.add_rms_norm.default(
        x, residual, weight, eps, weight_offset, cast_first
    )
    return both


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, *x.shape]: every rank's tensor. Empty tensors do not travel."""
    parts = x.new_empty((group.size(), *x.shape))
    if x.numel() and group.size() > 1:
        gather_into(parts.view(-1), x.contiguous().view(-1), group)
    elif x.numel():
        parts[0] = x
    return parts


def _reduce_own_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """rows: [R, H] of each rank → the sum of this rank's rows, [own, H]; ``own`` may be 0."""
    size, rank = group.size(), group.rank()
    chunk = chunk_rows(len(rows), size)
    counts = [max(0, min(chunk, len(rows) - r * chunk)) for r in range(size)]
    received = rows.new_empty((size, counts[rank], rows.shape[1]))
    if rows.numel():
        width = rows.shape[1]
        dist.all_to_all_single(
            received.view(-1),
            rows.contiguous().view(-1),
            [counts[rank] * width] * size,
            [count * width for count in counts],
            group=group,
        )
    return ordered_sum(received)


def _gather_chunks(own: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """own: this rank's [≤ chunk, H] → [rows, H]. Only ranks at the end have less than a chunk."""
    chunk = chunk_rows(rows, group.size())
    return _gather(_padded(own, chunk), group).view(-1, own.shape[1])[:rows]


def _padded(own: Tensor, rows: int) -> Tensor:
    """own: [≤ rows, H] → [rows, H], zeros below."""
    if len(own) == rows:
        return own
    return torch.cat([own, own.new_zeros(rows - len(own), own.shape[1])])
