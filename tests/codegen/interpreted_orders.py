"""GPU kernels whose order has a simulator, interpreted, against it. Prints how many results are equal.

Run with TRITON_INTERPRET=1: launchers then take tensors in ordinary memory. Not in bf16, to which the
interpreter truncates and devices round. Its fused multiply-add rounds twice; here it is the simulators'.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from llm42c.codegen.examples import Numbers, for_kernel, for_specification
from llm42c.codegen.ops import registry
from llm42c.codegen.order import GROUPS
from llm42c.codegen.simulate import fma


def _fma(self: object, x: Any, y: Any, z: Any) -> Any:
    a, b, c = (torch.from_numpy(np.ascontiguousarray(t.data)) for t in (x, y, z))
    return interpreter.TensorHandle(fma(a, b, c).numpy(), z.dtype.scalar)


def compare() -> dict[str, list[bool]]:
    """Operator → whether each example in each dtype has the simulator's bits."""
    registry.define()
    interpreter.InterpreterBuilder.create_fma = _fma
    found: dict[str, list[bool]] = {}
    for name, launch in registry.implemented("cuda").items():
        op = registry.operators()[name]
        # The order of a GPU differs from the CPU's in SiLU alone.
        simulate = op.simulators.get(GROUPS if name == "linear_q" else op.orders["cuda"])
        if simulate is None or op.examples is None or op.traffic:
            continue
        for dtype in (torch.float32, torch.float16):
            for example in op.examples(Numbers(dtype)):
                if name == "linear_q" and example[-1]:
                    continue
                same = torch.equal(launch(*for_kernel(example)), simulate(*for_specification(example)))
                found.setdefault(name, []).append(same)
    return found


if __name__ == "__main__":
    print(json.dumps(compare()))
