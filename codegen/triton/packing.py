"""Packed weights of GPUs: panels as wide as a program's tile, columns in natural order."""

from __future__ import annotations

import torch
from torch import Tensor

from llm42c.codegen.operator import implements
from llm42c.codegen.packing import Packing

PANEL = 64  # columns


class Panels(Packing):
    """Columns side by side for each k; those past N are zero."""

    def linear_pack(self, weight: Tensor) -> Tensor:
        """→ [ceil(N / PANEL), K, PANEL]"""
        n, k = weight.shape
        return weight.new_empty(-(-n // PANEL), k, PANEL)


@implements("linear_pack", "cuda")
def linear_pack(weight: Tensor) -> Tensor:
    """``llm42::linear_pack``."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -n % PANEL))
    return padded.view(-1, PANEL, k).transpose(1, 2).contiguous()


@implements("linear_unpack", "cuda")
def linear_unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """``llm42::linear_unpack``."""
    return packed.transpose(1, 2).reshape(-1, k)[:n].contiguous()
