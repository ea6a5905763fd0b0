"""Launching the fused collectives over ``torch.distributed._symmetric_memory``.

A group that was enabled (:func:`enable`) has one buffer on each rank, and its operators on CUDA tensors run
here; for any other group they run by process-group calls (``codegen/dist``). Messages that the buffer does
not hold are an error: nothing falls back silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.all_reduce_norm import Form, FusedSpec, emit, emit_multimem, programs
from llm42c.codegen.triton.devices import device_of

ONE_SHOT_BYTES = 256 * 1024  # of one rank's message; above, two shots move less


@dataclass
class Workspace:
    """The symmetric buffer of one group on this rank."""

    buffer: Tensor  # [max_bytes] uint8
    handle: Any  # of torch's symmetric memory
    multimem: bool

    @property
    def rank(self) -> int:
        return int(self.handle.rank)

    @property
    def world(self) -> int:
        return int(self.handle.world_size)


_workspaces: dict[str, Workspace] = {}


def enable(group_name: str, max_bytes: int, device: torch.device, *, nondeterministic: bool = False) -> None:
    """Give the group a symmetric buffer. Collective: all its ranks call it with the same arguments.

    ``nondeterministic=True`` lets the NVLink switch add sums of bf16: results then differ from run to run.
    """
    import torch.distributed._symmetric_memory as memory

    symmetric: Any = memory
    buffer = symmetric.empty(max_bytes, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(buffer, group_name)
    if nondeterministic and not handle.multicast_ptr:
        raise ValueError(f"the devices of group {group_name!r} have no switch that adds")
    _workspaces[group_name] = Workspace(buffer, handle, nondeterministic)


def enabled(group_name: str) -> bool:
    return group_name in _workspaces


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """``llm42::all_reduce``."""
    space, rows = _workspaces[group_name], x.reshape(-1, x.shape[-1])
    if space.multimem and x.dtype == torch.bfloat16:
        return _multimem(space, rows).view(x.shape)
    y, _ = _launch(space, "sum", rows, None, None, 0.0, 0.0, True)
    return y.view(x.shape)


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
    space, rows = _workspaces[group_name], x.reshape(-1, x.shape[-1])
    if x.dtype != residual.dtype or (space.multimem and x.dtype == torch.bfloat16):
        total = all_reduce(x, group_name).to(residual.dtype)
        both: tuple[Tensor, Tensor] = torch.ops.llm42.add_rms_norm.default(
            total, residual, weight, eps, weight_offset, cast_first
        )
        return both
    form: Form = "one" if rows.numel() * rows.element_size() <= ONE_SHOT_BYTES else "two"
    own = residual.reshape(-1, x.shape[-1])
    y, total = _launch(space, form, rows, own, weight, eps, weight_offset, cast_first)
    return y.view(x.shape), total.view(x.shape)


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
    """``llm42::all_reduce_add_rms_norm_sharded``; x and residual of one dtype."""
    if x.dtype != residual.dtype:
        raise ValueError(f"partial sums in {x.dtype} and a divided residual in {residual.dtype}")
    rows = x.reshape(-1, x.shape[-1])
    y, total = _launch(
        _workspaces[group_name], "shard", rows, residual, weight, eps, weight_offset, cast_first
    )
    return y.view(x.shape), total


def _launch(
    space: Workspace,
    form: Form,
    rows: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
) -> tuple[Tensor, Tensor]:
    """rows: [R, H] → (y [R, H], total of the residual's shape)."""
    y = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    total = y if residual is None else torch.zeros(residual.shape, dtype=y.dtype, device=y.device)
    if not y.numel():
        return y, total
    _place(space, rows)
    dtype = str(rows.dtype).removeprefix("torch.")
    spec = FusedSpec(rows.shape[1], dtype, space.world, form, weight is not None, cast_first)
    device = device_of(rows.device)
    fn = kernel.load("all_reduce_norm", emit(spec), device)
    grid = programs(form, len(rows), space.world, space.handle.signal_pad_size, device.count("sms", 132))
    other = y if residual is None else residual
    other = other if other.stride(-1) == 1 else other.contiguous()
    scale = y if weight is None else weight.contiguous()
    fn[(grid,)](
        space.handle.buffer_ptrs_dev, space.handle.signal_pad_ptrs_dev, other, scale, y, total, len(rows),
        other.stride(0), eps, offset, space.rank, num_warps=spec.warps, **kernel.OPTIONS,
    )  # fmt: skip
    return y, total


def _multimem(space: Workspace, rows: Tensor) -> Tensor:
    placed = _place(space, rows)
    if rows.numel():
        device, world = device_of(rows.device), space.world
        fn = kernel.load("multimem_sum", emit_multimem(rows.shape[1], world), device)
        grid = programs("sum", len(rows), world, space.handle.signal_pad_size, device.count("sms", 132))
        handle = space.handle
        fn[(grid,)](handle.multicast_ptr, handle.signal_pad_ptrs_dev, len(rows), space.rank, num_warps=4)
    return placed.clone()


def _place(space: Workspace, rows: Tensor) -> Tensor:
    """Copy partial sums into this rank's buffer; → the buffer as [R, H]."""
    size = rows.numel() * rows.element_size()
    if size > space.buffer.numel():
        raise ValueError(f"a message of {size} bytes; the group was enabled for {space.buffer.numel()}")
    placed = space.buffer[:size].view(rows.dtype).view(rows.shape)
    placed.copy_(rows)
    return placed
