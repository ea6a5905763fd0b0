"""Square roots that are the same on every machine: correctly rounded, as IEEE 754 has them.

A loop that a compiler makes rounds them so. An eager ``torch.sqrt`` of fp32 on a CPU may be a library's,
which is one unit off for some numbers. For tables that are computed once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sqrt(x: Tensor) -> Tensor:
    """x: any shape and dtype → √x in x.dtype; in fp32 for integers. 16-bit numbers are computed in fp32."""
    dtype = x.dtype if x.is_floating_point() else torch.float32
    wide = x if dtype == torch.float64 else x.float()
    if wide.device.type != "cpu":
        return wide.sqrt().to(dtype)
    with np.errstate(invalid="ignore"):  # of a negative number: NaN, as torch has it
        return torch.from_numpy(np.asarray(np.sqrt(wide.detach().numpy()))).to(dtype)


def rsqrt(x: Tensor) -> Tensor:
    """1 / √x: root and quotient rounded, as in a compiled loop; then to x.dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (1.0 / sqrt(wide)).to(x.dtype if x.is_floating_point() else torch.float32)
