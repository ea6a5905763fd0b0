"""Memory that the operating system manages: large pages for what is read at random, and mapped files.

Weights that a model has read from a file by mapping it count as this process's memory once they are touched,
though they could be read again at any time: :func:`forget` gives them back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm42c.device import CPU

LARGE = 2 << 20  # bytes of a large page


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """A tensor of zeros; on the CPU in large pages, if it fills some and the system grants them.

    Pages of a KV cache lie far apart, so with small pages of memory nearly every one of them costs a walk
    through the page tables. They are the system's, and untouched: :func:`populate` has them ready.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if device.type != "cpu" or advice is None or nbytes < LARGE:
        return torch.zeros(*shape, dtype=dtype, device=device)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # what is shared gets no large pages
    memory = mmap.mmap(-1, -(-nbytes // LARGE) * LARGE, flags=private)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(advice)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(*shape)


_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE: pages as a write would make them, and no byte is written


def populate(tensors: Sequence[Tensor]) -> None:
    """Let a thread make the pages of tensors from :func:`zeros`, so that no request waits for them.

    Whoever comes before it makes its own. On a system that cannot, that is everybody.
    """
    large = [t for t in tensors if t.device.type == "cpu" and t.nbytes >= LARGE]
    if large:
        threading.Thread(target=_populate, args=(large,), name="llm42-pages", daemon=True).start()


def _populate(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _POPULATE_WRITE) != 0:
            return


# Of an entry of /proc/self/pagemap. A page that a write has made this process's own has no _FILE.
_PRESENT, _SWAPPED, _FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def forget(tensor: Tensor) -> int:
    """Give back the pages of a mapped file in which ``tensor`` lies; returns the bytes given back.

    They are read from the file again when the tensor is used. Nothing is given back, and nothing changes, for
    a tensor that lies elsewhere, that has been written to, or where the operating system does not tell
    (``/proc/self/pagemap``).
    """
    if tensor.device.type != "cpu" or tensor.is_meta or not tensor.is_contiguous():
        return 0
    page = mmap.PAGESIZE
    first, last = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    if last <= first or not hasattr(mmap, "MADV_DONTNEED"):
        return 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * 8)
            pages = np.frombuffer(file.read((last - first) * 8), dtype=np.uint64)
    except OSError:
        return 0
    present = (pages & _PRESENT) != 0
    if len(pages) != last - first or (pages & _SWAPPED).any() or not (pages[present] & _FILE).all():
        return 0
    start, length = ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page)
    return int(present.sum()) * page if _libc().madvise(start, length, mmap.MADV_DONTNEED) == 0 else 0


def trim() -> None:
    """Give memory that has been freed back to the system.

    The C library keeps what lies between pieces in use, and what a large weight leaves there is often too
    small for the next one.
    """
    give_back = getattr(_libc(), "malloc_trim", None)  # of the GNU C library
    if give_back is not None:
        give_back(ctypes.c_size_t(0))


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)
