"""Folded kernels against their files as they stand, in Triton's interpreter; prints one JSON object."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.triton import fold, kernel, norm
from llm42c.codegen.triton.spec import power_of_two


def unfolded(file: str, constants: Mapping[str, Any]) -> Any:
    """The kernel of ``kernels/<file>.py``, all branches in place, with other values of its constants."""
    text = (fold.FOLDER / f"{file}.py").read_text()
    for name, value in constants.items():
        old = re.compile(rf"^{name} = tl\.constexpr\(.*?\)", re.MULTILINE)
        text, found = old.subn(f"{name} = tl.constexpr({value!r})", text)
        assert found == 1, name
    return kernel.load(file, text)


def norms() -> dict[str, Any]:
    """Every combination of branches: equal bits, and how many different results there are."""
    g = torch.Generator().manual_seed(0)
    size, rows = 40, 3
    tensors = [torch.randn(rows, size, generator=g, dtype=torch.float32).bfloat16() for _ in range(4)]
    x, residual, weight, bias = tensors
    results: list[Tensor] = []
    same = True
    for residual_, weight_, bias_, cast, mean in itertools.product((False, True), repeat=5):
        spec = norm.NormSpec(size, "bfloat16", residual_, weight_, bias_, cast, mean)
        constants = {"SIZE": size, "WIDTH": power_of_two(size), **spec.decided()}
        both = []
        for fn in (kernel.load("norm", norm.emit(spec)), unfolded("norm", constants)):
            y, total = torch.zeros_like(x), torch.zeros_like(x)
            fn[(rows,)](x, residual, weight[0], bias[0], y, total, 1e-5, 0.5)
            both.append(torch.stack([y, total]))
        same &= torch.equal(*both)
        results.append(both[0])
    different = {r.view(torch.int16).numpy().tobytes() for r in results}
    return {"same": same, "different": len(different)}


if __name__ == "__main__":
    print(json.dumps({"norm": norms()}))
