"""Every operator of the CPU on its examples, which are exact on every machine, as digests of its results.

As a program, ``python order_bits.py ISA`` prints them as JSON for the kernels of one instruction set.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.cpu import build
from llm42c.codegen.examples import DTYPES, Numbers, for_kernel
from llm42c.codegen.operator import Operator
from llm42c.codegen.ops import registry


def computing(operators: dict[str, Operator]) -> dict[str, Operator]:
    """Those that have bits to show: they have examples and do more than copy."""
    return {name: op for name, op in operators.items() if op.examples and not op.moves}


def kernel(op: Operator, example: tuple[Any, ...]) -> list[Tensor]:
    """What the kernels that are loaded give."""
    results = op.overload(*for_kernel(example))
    return [results] if isinstance(results, Tensor) else list(results)


def digests(
    compute: Callable[[Operator, tuple[Any, ...]], list[Tensor]] = kernel,
) -> dict[str, str]:
    """``operator order/version`` → digest over all dtypes and examples."""
    found = {}
    for name, op in computing(registry.operators()).items():
        hasher = hashlib.sha256()
        for dtype in DTYPES:
            for example in op.examples(Numbers(dtype)) if op.examples else ():
                for result in compute(op, example):
                    hasher.update(result.reshape(-1).view(torch.uint8).numpy().tobytes())
        found[f"{name} {op.orders['cpu']}"] = hasher.hexdigest()[:32]
    return found


if __name__ == "__main__":
    registry.define()
    build.load_library(sys.argv[1])
    json.dump(digests(), sys.stdout, indent=1)
    print()
