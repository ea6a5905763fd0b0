"""RMSNorm, residual and RMSNorm, and LayerNorm on a GPU: one program a row, one layout for a row length.

The sum over a row is a tree whose shape follows from the row's length alone, so a row's bits do not depend
on the other rows. (The compiler lays a row out by how wide it can be loaded. So rows are contiguous and
aligned here, and others are copied.) Roundings are those of ``codegen/ops/norm.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.devices import target_of
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import DTYPES, power_of_two

_KERNEL = '''
@triton.jit
def norm(x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, eps, offset):
    """@DOC@ x: [R, H]. Program: row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    held = i < SIZE
    x = tl.load(x_ptr + row * SIZE + i, mask=held, other=0.0)
@RESIDUAL@
    wide = x.to(tl.float32)
@SCALE@
@WEIGHT@
    tl.store(y_ptr + row * SIZE + i, y.to(y_ptr.dtype.element_ty), mask=held)
'''
_RESIDUAL = """
    residual = tl.load(residual_ptr + row * SIZE + i, mask=held, other=0.0)
    x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
    tl.store(total_ptr + row * SIZE + i, x, mask=held)
"""
_RMS = """
    rstd = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = wide * rstd
"""
_MEAN = """
    centred = tl.where(held, wide - tl.sum(wide, 0) / SIZE, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / SIZE + eps)
    normed = centred * rstd
"""
_PLAIN = """
    y = normed
"""
_CAST_FIRST = """
    weight = tl.load(weight_ptr + i, mask=held, other=0.0).to(tl.float32)
    weight = (weight + offset).to(x.dtype).to(tl.float32)
    y = normed.to(x.dtype).to(tl.float32) * weight
"""
_IN_FP32 = """
    weight = tl.load(weight_ptr + i, mask=held, other=0.0).to(tl.float32)
    y = normed * (weight + offset)
"""
_BIAS = """
    y = y + tl.load(bias_ptr + i, mask=held, other=0.0).to(tl.float32)
"""


@dataclass(frozen=True)
class NormSpec:
    """One kernel. ``mean``: LayerNorm."""

    size: int
    dtype: str
    residual: bool = False
    weight: bool = True
    bias: bool = False
    cast_first: bool = False
    mean: bool = False

    @property
    def warps(self) -> int:
        return min(16, max(1, power_of_two(self.size) // 512))


@functools.cache
def emit(spec: NormSpec) -> str:
    """The file of one specialisation; its kernel is ``norm``."""
    weight = _PLAIN if not spec.weight else _CAST_FIRST if spec.cast_first else _IN_FP32
    name = "LayerNorm." if spec.mean else "RMSNorm of residual + x." if spec.residual else "RMSNorm."
    text = _KERNEL.replace("@DOC@", name)
    text = text.replace("@RESIDUAL@\n", _RESIDUAL.lstrip("\n") if spec.residual else "")
    text = text.replace("@SCALE@", (_MEAN if spec.mean else _RMS).strip("\n"))
    text = text.replace("@WEIGHT@", (weight + (_BIAS.lstrip("\n") if spec.bias else "")).strip("\n"))
    constants = {"SIZE": spec.size, "WIDTH": power_of_two(spec.size)}
    return module(name.rstrip("."), f"rows of {spec.size} in {DTYPES[spec.dtype]}", constants, text)


def _launch(
    spec: NormSpec,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    other = rows if residual is None else _rows(residual)
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty_like(y)
    if y.numel():
        fn = kernel.load("norm", emit(spec), target_of(x.device))
        some_weight, some_bias = (y if t is None else kernel.aligned(t.contiguous()) for t in (weight, bias))
        fn[(len(rows),)](
            rows, other, some_weight, some_bias, y, total, eps, offset,
            num_warps=spec.warps, **kernel.OPTIONS,
        )  # fmt: skip
    return y.reshape(x.shape), total.reshape(x.shape)


def _rows(x: Tensor) -> Tensor:
    rows: Tensor = kernel.aligned(x.reshape(-1, x.shape[-1]).contiguous())
    return rows


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@implements("rms_norm", "cuda")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool) -> Tensor:
    """``llm42::rms_norm``. x: [..., H]."""
    spec = NormSpec(x.shape[-1], _dtype(x), weight=weight is not None, cast_first=cast_first)
    return _launch(spec, x, None, weight, None, eps, weight_offset)[0]


@implements("add_rms_norm", "cuda")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """``llm42::add_rms_norm``: (normed, residual + x)."""
    spec = NormSpec(x.shape[-1], _dtype(x), residual=True, weight=weight is not None, cast_first=cast_first)
    return _launch(spec, x, residual, weight, None, eps, weight_offset)


@implements("layer_norm", "cuda")
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``llm42::layer_norm``. x: [..., H]."""
    spec = NormSpec(x.shape[-1], _dtype(x), weight=weight is not None, bias=bias is not None, mean=True)
    return _launch(spec, x, None, weight, bias, eps, 0.0)[0]
