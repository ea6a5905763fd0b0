"""Row reductions under the interpreter, in a process of their own; prints one JSON object."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from llm42c.codegen.ops import registry
from llm42c.codegen.triton import reduce, running

EPS = torch.finfo(torch.float32).eps


def main() -> dict[str, float]:
    """Errors over their bounds, by case; equality of bits as 0 or 2."""
    registry.define()
    ops, g = registry.operators(), torch.Generator().manual_seed(0)
    ratios: dict[str, float] = {}
    for size in (1, 70, 300):
        x = torch.randn(5, size, generator=g) * 4
        want = ops["row_sum"].reference(x, [1], False)
        limit = size * EPS * x.abs().double().sum(1)
        ratios[f"sum/{size}"] = float(((reduce.row_sum(x, [1], False) - want).abs() / limit).max())
        ratios |= softmaxes(ops, x)
        for name, apply in (
            ("sum", lambda t: reduce.row_sum(t, [1], False)),
            ("softmax", reduce.row_softmax),
            ("log_softmax", reduce.row_log_softmax),
        ):
            alone, among = apply(x[3:4])[0], apply(x.flip(0))[1]
            ratios[f"{name}/{size}/alone"] = 0.0 if torch.equal(alone, among) else 2.0
    x = torch.randn(3, 4, 50, generator=g).half()
    for dims in ([0], [-1, 1], []):
        got, want = reduce.row_sum(x, dims, True), ops["row_sum"].reference(x, dims, True)
        assert got.shape == want.shape
        whole = 3 * 4 * 50 * EPS * x.abs().double().sum()
        ratios[f"half/{dims}"] = float(
            ((got - want).abs() / (whole + want.abs() * torch.finfo(x.dtype).eps)).max()
        )
    x = 1 + torch.randn(70, 9, generator=g) / 8
    for name, apply in (("running_sum", running.running_sum), ("running_product", running.running_product)):
        want = ops[name].reference(x, 1)
        ratios[name] = float(((apply(x, 1) - want).abs() / (9 * EPS * ops[name].reference(x.abs(), 1))).max())
        ratios[f"{name}/alone"] = 0.0 if torch.equal(apply(x[66:67], -1)[0], apply(x, 1)[66]) else 2.0
        ratios[f"{name}/dim"] = 0.0 if torch.equal(apply(x.t(), 0).t(), apply(x, 1)) else 2.0
    ratios["empty"] = 0.0 if not reduce.row_sum(torch.ones(2, 0), [1], False).any() else 2.0
    return ratios


def softmaxes(ops: dict[str, registry.Operator], x: Tensor) -> dict[str, float]:
    """exp doubles an error d of its argument into a factor 1 + d; sums add n roundings."""
    n, spread = x.shape[1], float(x.max() - x.min())
    relative = (n + 2 * spread + 16) * EPS
    soft, log = ops["row_softmax"].reference(x), ops["row_log_softmax"].reference(x)
    return {
        f"softmax/{n}": float(((reduce.row_softmax(x) - soft).abs() / (relative * soft + 1e-38)).max()),
        f"log_softmax/{n}": float(
            ((reduce.row_log_softmax(x) - log).abs() / (relative + 4 * EPS * log.abs())).max()
        ),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
