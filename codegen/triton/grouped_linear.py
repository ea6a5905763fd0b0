"""Matrix products with a weight chosen for each row, on a GPU: the experts of a mixture.

Rows are put in order of their expert on the device and cut into tiles that never span two experts; the tile
and its order over k are those of ``linear_dense``. So a row has the bits of ``linear_dense`` with its own
expert's weight, whichever and however many rows share the expert.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.linear import LinearSpec, spec_for
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import DTYPES


@functools.cache
def emit(spec: LinearSpec) -> str:
    """The file of one specialisation; its kernel is ``grouped_linear``."""
    constants = {"ROWS": spec.rows, "COLUMNS": spec.columns, "STEP": spec.step, "HAS_BIAS": spec.bias}
    subject = f"{DTYPES[spec.dtype]}, M {spec.rows}"
    return module(
        "Matrix products of experts with one order over k",
        subject,
        constants,
        fold("grouped_linear", "grouped_linear"),
    )


def work_list(group: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles of at most ``rows`` rows of one expert, made on the device; sizes come from shapes alone.

    group: [R] int64 → order [R] int32; of each tile its expert and first place in ``order`` [tiles] int32,
    where expert ``experts`` takes the rows without one and ``experts + 1`` means no tile; the end of each
    expert's rows in ``order`` [experts + 1] int32.
    """
    known = (group >= 0) & (group < experts)
    ids, order = torch.sort(torch.where(known, group, experts), stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts + 1, device=group.device), right=True)  # [E + 1]
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = (ends - begins + rows - 1) // rows
    last = tiles.cumsum(0)
    most = len(group) // rows + min(experts + 1, len(group))
    tile = torch.arange(most, device=group.device)
    expert = torch.searchsorted(last, tile, right=True)  # [tiles]
    of = expert.clamp(max=experts)
    first = begins[of] + (tile - (last - tiles)[of]) * rows
    return order.int(), expert.int(), first.int(), ends.int()


@implements("grouped_linear", "cuda")
def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: Tensor, transposed: bool) -> Tensor:
    """``llm42::grouped_linear``. x: [R, K], weight: [E, N, K], [E, K, N] if transposed → [R, N].

    A group outside of [0, E) cannot raise here without waiting for the device: its row is NaN.
    """
    experts, n, k = (
        weight.shape[0],
        weight.shape[2 if transposed else 1],
        weight.shape[1 if transposed else 2],
    )
    if x.dim() != 2 or x.shape[1] != k or group.shape != x.shape[:1]:
        raise ValueError(
            f"grouped_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)} and group "
            f"{tuple(group.shape)} do not fit together"
        )
    y = torch.empty(len(x), n, dtype=x.dtype, device=x.device)
    if y.numel():
        device = device_of(x.device)
        dtype = str(x.dtype).removeprefix("torch.")
        spec = spec_for(device, -(-len(x) // experts), dtype, packed=False, bias=bias is not None)
        order, tile_expert, tile_first, ends = work_list(group, experts, spec.rows)
        fn = kernel.load("grouped_linear", emit(spec), device)
        x = kernel.aligned(x)
        strides = weight.transpose(1, 2).stride() if transposed else weight.stride()
        fn[(-(-n // spec.columns), len(tile_expert))](
            x, weight, y if bias is None else kernel.aligned(bias.contiguous()), y, order, tile_expert,
            tile_first, ends, experts, n, k, x.stride(0), *strides,
            num_warps=spec.warps, num_stages=spec.stages, **kernel.OPTIONS,
        )  # fmt: skip
    return y
