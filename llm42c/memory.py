"""Memory for tensors that are read at random: large pages where the operating system has them."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from llm42c.device import CPU

LARGE = 2 << 20  # bytes of a large page


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """A tensor of zeros; on the CPU in large pages, if it fills some and the system grants them.

    Pages of a KV cache lie far apart, so with small pages of memory nearly every one of them costs a walk
    through the page tables. The memory is touched here, not when the first request needs it.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if device.type != "cpu" or advice is None or nbytes < LARGE:
        return torch.zeros(*shape, dtype=dtype, device=device)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # what is shared gets no large pages
    memory = mmap.mmap(-1, -(-nbytes // LARGE) * LARGE, flags=private)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(advice)
    flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape))
    return flat.zero_().view(*shape)
