"""Folded kernels against their files as they stand, in Triton's interpreter; prints one JSON object."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.triton import fold, kernel, linear, norm, packing, reduce, running
from llm42c.codegen.triton.spec import power_of_two


def unfolded(file: str, name: str, constants: Mapping[str, Any]) -> Any:
    """A kernel of ``kernels/<file>.py``, all branches in place, with other values of its constants."""
    text = (fold.FOLDER / f"{file}.py").read_text()
    for constant, value in constants.items():
        old = re.compile(rf"^{constant} = tl\.constexpr\(.*?\)", re.MULTILINE)
        text, found = old.subn(f"{constant} = tl.constexpr({value!r})", text)
        assert found == 1, constant
    return kernel.load(name, text)


class Pairs:
    """Results of folded kernels, each compared with that of its file."""

    def __init__(self) -> None:
        self.same, self._results = True, set[bytes]()

    def add(
        self, folded: Any, whole: Any, outputs: int, like: Tensor, run: Callable[[Any, list[Tensor]], None]
    ) -> None:
        """``run`` launches a kernel that fills tensors like ``like``."""
        both = []
        for fn in (folded, whole):
            out = [torch.zeros_like(like) for _ in range(outputs)]
            run(fn, out)
            both.append(torch.stack(out))
        self.same &= torch.equal(*both)
        self._results.add(both[0].view(torch.uint8).numpy().tobytes())

    def found(self) -> dict[str, Any]:
        return {"same": self.same, "different": len(self._results)}


def norms() -> dict[str, Any]:
    """Every combination of branches."""
    g, pairs = torch.Generator().manual_seed(0), Pairs()
    size, rows = 40, 3
    x, residual, weight, bias = (torch.randn(rows, size, generator=g).bfloat16() for _ in range(4))
    for branches in itertools.product((False, True), repeat=5):
        spec = norm.NormSpec(size, "bfloat16", *branches)
        constants = {"SIZE": size, "WIDTH": power_of_two(size), **spec.decided()}
        whole = unfolded("norm", "norm", constants)

        def run(fn: Any, out: list[Tensor]) -> None:
            fn[(rows,)](x, residual, weight[0], bias[0], *out, 1e-5, 0.5)

        pairs.add(kernel.load("norm", norm.emit(spec)), whole, 2, x, run)
    return pairs.found()


def linears() -> dict[str, Any]:
    """Packed and plain weights, with and without bias: the layouts have one result."""
    g, pairs = torch.Generator().manual_seed(0), Pairs()
    m, n, k = 3, 100, 24
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((m, k), (n, k), (n,)))
    for packed, biased in itertools.product((False, True), repeat=2):
        spec = linear.LinearSpec("float32", packed, biased, 16, packing.PANEL, 16, 4, 2)
        tile = {"ROWS": 16, "COLUMNS": packing.PANEL, "STEP": 16}
        whole = unfolded("linear", "linear", {**tile, "HAS_BIAS": biased, "PACKED": packed})
        held = packing.linear_pack(weight) if packed else weight

        def run(fn: Any, out: list[Tensor], held: Tensor = held) -> None:
            fn[(-(-n // packing.PANEL), 1)](x, held, bias, *out, m, n, k, k, n)

        pairs.add(kernel.load("linear", linear.emit(spec)), whole, 1, torch.empty(m, n), run)
    return pairs.found()


def rows() -> dict[str, Any]:
    """Softmax and log-softmax, running sum and running product."""
    x, pairs = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)), Pairs()

    def softmax(fn: Any, out: list[Tensor]) -> None:
        fn[(3,)](x, *out, 300)

    def running_(fn: Any, out: list[Tensor]) -> None:
        fn[(1,)](x, *out, 3, 300)

    for log, name in enumerate(("row_softmax", "row_log_softmax")):
        whole = unfolded("reduce", "row_softmax", {"BLOCK": 128, "LOG": bool(log)})
        pairs.add(kernel.load(name, reduce.emit(name, 128)), whole, 1, x, softmax)
    for product, name in enumerate(("running_sum", "running_product")):
        whole = unfolded("running", "running", {"PRODUCT": bool(product)})
        pairs.add(kernel.load(name, running.emit(name)), whole, 1, x, running_)
    return pairs.found()


if __name__ == "__main__":
    print(json.dumps({"norm": norms(), "linear": linears(), "rows": rows()}))
