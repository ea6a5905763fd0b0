"""Packed weights of the CPU, as the kernels read them (``kernels/gemm_lanes.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from llm42c.codegen.packing import Packing

PANEL = 48  # columns


class Panels(Packing):
    """Columns side by side for each k, of bf16 for each two; the same for every instruction set."""

    def linear_pack(self, weight: Tensor) -> Tensor:
        """→ [ceil(N / PANEL), K, PANEL], of bf16 [ceil(N / PANEL), ceil(K / 2), PANEL, 2]"""
        n, k = weight.shape
        if weight.dtype == torch.bfloat16:
            return weight.new_empty(-(-n // PANEL), -(-k // 2), PANEL, 2)
        return weight.new_empty(-(-n // PANEL), k, PANEL)
