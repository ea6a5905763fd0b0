"""Packed weights of the CPU, as the kernels read them (``kernels/gemm_lanes.h``)."""

from __future__ import annotations

from torch import Tensor

from llm42c.codegen.packing import Packing

PANEL = 48  # columns


class Panels(Packing):
    """Columns side by side for each k; the order inside of a panel follows the instruction set, so a packed
    weight is for this process, not for a file."""

    def linear_pack(self, weight: Tensor) -> Tensor:
        """→ [ceil(N / PANEL), K, PANEL]"""
        n, k = weight.shape
        return weight.new_empty(-(-n // PANEL), k, PANEL)
