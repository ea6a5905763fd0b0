"""Inputs of an operator's examples, exact on every machine: what every generic test of operators is fed with.

An operator declares them as ``examples=``: a function that takes :class:`Numbers` and yields argument lists::

    def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
        x, weight = r(ROWS, WIDTH), r(WIDTH)
        yield x, weight, 1e-5, 0.0, True
        yield x, None, 1e-2, 1.0, False

Whoever runs them gives each dtype of :data:`DTYPES` its own numbers. An example that takes another dtype
converts, or asks ``r.dtype``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, WIDTH, OUT = 7, 577, 100  # rows of examples; neither width is a multiple of any vector or tile


class Numbers:
    """Values in [-scale, scale) without a library's random numbers, whose bits hang on the machine."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._next = 0

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        count = torch.Size(shape).numel()
        i = torch.arange(self._next, self._next + count)
        self._next += count
        mixed = (i * 2654435761 + 12345) % 2**32
        mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
        mixed = (mixed ^ (mixed >> 13)) % 2**23
        return ((mixed.double() / 2**22 - 1) * scale).to(self.dtype).view(shape)

    def skip(self, count: int) -> Numbers:
        """Leave out ``count`` numbers: golden digests are of numbers that related operators share."""
        self._next += count
        return self


@dataclass(frozen=True)
class Packed:
    """Stands in an example for the packed form of ``weight: [N, K]``, which is each target's own."""

    weight: Tensor


def for_specification(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments for an operator's reference and simulators, which take the weight for a packed one."""
    return tuple(_own(a.weight if isinstance(a, Packed) else a) for a in example)


def for_kernel(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments for ``torch.ops``, packed by the kernels that are loaded."""
    pack = torch.ops.llm42.linear_pack
    return tuple(pack(a.weight) if isinstance(a, Packed) else _own(a) for a in example)


def _own(argument: Any) -> Any:
    """A tensor of the same strides that a call may write to."""
    if not isinstance(argument, Tensor):
        return argument
    own = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype)
    return own.copy_(argument)
