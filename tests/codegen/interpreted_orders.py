"""GPU kernels whose order has a simulator, interpreted, against it. Prints how many results are equal.

Run with TRITON_INTERPRET=1: launchers then take tensors in ordinary memory. Not in bf16, to which the
interpreter truncates and devices round.
"""

from __future__ import annotations

import json

import torch

from llm42c.codegen.examples import Numbers, for_kernel, for_specification
from llm42c.codegen.ops import registry


def compare() -> dict[str, list[bool]]:
    """Operator → whether each example in each dtype has the simulator's bits."""
    registry.define()
    found: dict[str, list[bool]] = {}
    for name, launch in registry.implemented("cuda").items():
        op = registry.operators()[name]
        simulate = op.simulators.get(op.orders["cuda"])
        if simulate is None or op.examples is None or op.traffic:
            continue
        for dtype in (torch.float32, torch.float16):
            for example in op.examples(Numbers(dtype)):
                same = torch.equal(launch(*for_kernel(example)), simulate(*for_specification(example)))
                found.setdefault(name, []).append(same)
    return found


if __name__ == "__main__":
    print(json.dumps(compare()))
