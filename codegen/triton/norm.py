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
from llm42c.codegen.triton.devices import device_of
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import DTYPES, power_of_two


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

    def decided(self) -> dict[str, bool]:
        """The branches of ``kernels/norm.py``."""
        return {
            "HAS_RESIDUAL": self.residual,
            "HAS_WEIGHT": self.weight,
            "HAS_BIAS": self.bias,
            "CENTRED": self.mean,
            "CAST_FIRST": self.cast_first,
        }


@functools.cache
def emit(spec: NormSpec) -> str:
    """The file of one specialisation; its kernel is ``norm``."""
    kind = "LayerNorm" if spec.mean else "RMSNorm of residual + x" if spec.residual else "RMSNorm"
    text = fold("norm", "norm", spec.decided(), doc=f"{kind}. x: [R, H]. Program: row.")
    constants = {"SIZE": spec.size, "WIDTH": power_of_two(spec.size)}
    return module(kind, f"rows of {spec.size} in {DTYPES[spec.dtype]}", constants, text)


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
        fn = kernel.load("norm", emit(spec), device_of(x.device))
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
