"""Scaled dot-product attention on a GPU, in the order of the paged kernel, with a mask.

Keys in blocks from the first key that the mask shows to any row of the sequence, so that padding on either
side changes nothing; an online softmax inside a split, splits folded from the left. One tile for every
number of queries, so a row's bits do not depend on ``B``, ``Sq`` or ``Sk``. The value of a key that is hidden
from all rows of a tile is not read; one that is hidden from some of them must be finite.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from llm42c.codegen.device import Device
from llm42c.codegen.operator import implements
from llm42c.codegen.triton import fragments, kernel
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import DTYPES, power_of_two, tiles


@dataclass(frozen=True)
class DenseSpec:
    """One tile. ``mask``: "", "bool" or "float"."""

    group: int
    head_dim: int
    dtype: str
    causal: bool
    window: bool
    softcap: bool
    mask: str
    rows: int
    keys: int
    warps: int
    stages: int
    split: int = 512

    def decided(self) -> dict[str, bool]:
        """The branches of ``kernels/dense_attention.py``."""
        return {
            "CAUSAL": self.causal,
            "WINDOWED": self.window,
            "CAPPED": self.softcap,
            "MASKED": bool(self.mask),
            "ADDED": self.mask == "float",
        }

    def subject(self) -> str:
        """The tile in words."""
        return f"heads of {self.head_dim} in groups of {self.group}, {DTYPES[self.dtype]}"


def spec_for(
    device: Device,
    group: int,
    head_dim: int,
    dtype: str,
    causal: bool,
    window: bool,
    softcap: bool,
    mask: str,
) -> DenseSpec:
    """The tile for a device and head."""
    rows, keys, warps, _ = tiles(device, head_dim, dtype)
    rows, keys = min(rows, 32), min(keys, 32)  # the mask's and the keys' addresses need registers too
    return DenseSpec(group, head_dim, dtype, causal, window, softcap, mask, rows, keys, warps, stages=1)


@functools.cache
def emit(spec: DenseSpec) -> str:
    """The file of one specialisation; its kernel is ``dense_attention``."""
    constants = {
        "GROUP": spec.group,
        "HEAD_DIM": spec.head_dim,
        "DIM": max(16, power_of_two(spec.head_dim)),
        "ROWS": spec.rows,
        "KEYS": spec.keys,
        "SPLIT": spec.split,
        "STAGES": spec.stages,
        "LOG2E": 1.4426950408889634,
    }
    return module(
        "Attention in a fixed order",
        spec.subject(),
        constants,
        *fragments.states(sinks=False),
        fold("dense_attention", "attend", spec.decided()),
        fold("dense_attention", "dense_attention"),
    )


@implements("dense_attention", "cuda")
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """``llm42::dense_attention``. q: [B, Hq, Sq, D] → [B, Hq, Sq, D], laid out as [B, Sq, Hq, D].

    Raises ValueError for shapes that do not fit together.
    """
    batch, heads, q_len, dim = q.shape
    if k.shape != v.shape or k.dim() != 4 or k.shape[0] != batch or k.shape[3] != dim or heads % k.shape[1]:
        raise ValueError(
            f"dense_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} "
            "do not fit together"
        )
    kind = "" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    dtype = str(q.dtype).removeprefix("torch.")
    device = device_of(q.device)
    spec = spec_for(device, heads // k.shape[1], dim, dtype, causal, window > 0, softcap > 0, kind)
    q, k, v = (kernel.aligned(x) for x in (q, k, v))
    out = torch.empty(batch, q_len, heads, dim, dtype=q.dtype, device=q.device)
    some_mask, first = out, out
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = mask if kind == "bool" else mask.float()
        first = first_key(mask, batch)
        shown = mask.expand(batch, heads, q_len, k.shape[2])
        some_mask = shown.view(torch.uint8) if kind == "bool" else shown
        strides = shown.stride()
    numbers = (scale, softcap or 1.0, window)
    lengths = (q_len, k.shape[2], heads)
    tensors = (q, k, v, some_mask, first, out)
    integers: tuple[int, ...] = (*lengths, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides)
    if out.numel():
        fn = kernel.load("dense_attention", emit(spec), device)
        options = {**kernel.OPTIONS, **kernel.registers_for(device, spec.warps)}
        grid = (-(-q_len // spec.rows), batch * heads)
        fn[grid](*tensors, *integers, *numbers, num_warps=spec.warps, num_stages=spec.stages, **options)
    return out.transpose(1, 2)


def first_key(mask: Tensor, batch: int) -> Tensor:
    """The first key that a mask shows to any row, of each sequence: [B] int32; 0 if it shows none."""
    mask = mask[(None,) * (4 - mask.dim())]
    shown = mask if mask.dtype == torch.bool else mask != -torch.inf
    shown = shown.any(1).any(1)  # [B | 1, Sk | 1]
    return shown.int().argmax(-1).int().expand(batch).contiguous()
