"""Runs the fused all-reduce kernels in Triton's interpreter, ranks one after the other, buffers as ranks.

``TRITON_INTERPRET`` is read at import, so this is a program of its own; it prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.ops import all_reduce_add_rms_norm as operator
from llm42c.codegen.triton import kernel
from llm42c.codegen.triton.all_reduce_norm import Form, FusedSpec, emit

H, EPS, OFFSET = 100, 1e-5, 0.25


def digest(*tensors: Tensor) -> str:
    text = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(text).hexdigest()


def in_order(xs: list[Tensor]) -> Tensor:
    total = xs[0].float()
    for x in xs[1:]:
        total = total + x.float()
    return total.to(xs[0].dtype)


def run(
    form: Form, xs: list[Tensor], residual: Tensor, weight: Tensor, grid: int, in_turn: bool = True
) -> list[Any]:
    """(y, total) of every rank; without ``in_turn`` a rank does not wait for the others between its parts."""
    world, (rows, size) = len(xs), xs[0].shape
    dtype = str(xs[0].dtype).removeprefix("torch.")
    buffers = [x.clone() for x in xs]
    table = torch.tensor([b.data_ptr() for b in buffers])
    pads = torch.zeros(world, dtype=torch.int64)
    chunk = -(-rows // world)
    out: list[Any] = []
    for rank in range(world):
        own = residual[rank * chunk : (rank + 1) * chunk].contiguous() if form == "shard" else residual
        out.append((torch.zeros_like(xs[0]), torch.zeros(chunk if form == "shard" else rows, size), own))
    out = [(y, total.to(y.dtype), own) for y, total, own in out]
    for parts in ((1,), (2,)) if in_turn and form != "one" else ((1, 2),):
        spec = FusedSpec(size, dtype, world, form, cast_first=True, meetings=False, parts=parts)
        fn = kernel.load("all_reduce_norm", emit(spec))
        for rank, (y, total, own) in enumerate(out):
            fn[(grid,)](
                table.data_ptr(), pads.data_ptr(), own, weight, y, total, rows, size, EPS, OFFSET, rank,
                num_warps=spec.warps,
            )  # fmt: skip
    return [(y, total) for y, total, _ in out]


def check(
    form: Form, dtype: torch.dtype, world: int, rows: int, grid: int, in_turn: bool = True
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(rows)
    xs = [torch.randn(rows, H, generator=g).to(dtype) for _ in range(world)]
    residual = torch.randn(rows, H, generator=g).to(dtype)
    weight = torch.randn(H, generator=g).to(dtype)
    results = run(form, xs, residual, weight, grid, in_turn)
    want, _ = operator.all_reduce_add_rms_norm.reference(xs, residual, weight, EPS, OFFSET, True)
    total = residual + in_order(xs)  # each one rounding
    chunk = -(-rows // world)
    padded = torch.cat([total, total.new_zeros(chunk * world - rows, H)])
    exact = True
    for rank, (y, got) in enumerate(results):
        if form == "sum":
            exact &= torch.equal(y, in_order(xs))
        elif form == "shard":
            exact &= torch.equal(got, padded[rank * chunk : (rank + 1) * chunk])
        else:
            exact &= torch.equal(got, total)
    spacing = torch.finfo(dtype).eps
    error = (results[0][0].double() - want).abs() / (want.abs() + weight.double().abs() + 1)
    return {
        "exact": exact,
        "same_on_all_ranks": len({digest(y) for y, _ in results}) == 1,
        "error": 0.0 if form == "sum" else float(error.max()) / spacing,
        "digest": digest(results[0][0]),
    }


if __name__ == "__main__":
    found: dict[str, Any] = {}
    for form in ("one", "two", "shard", "sum"):
        for dtype in (torch.float32, torch.float16):
            for world, rows, grid in ((2, 5, 3), (4, 3, 1), (1, 4, 2)):
                name = f"{form} {dtype} {world}"
                found[name] = check(form, dtype, world, rows, grid)  # type: ignore[arg-type]
    found["other grid"] = check("two", torch.float32, 2, 5, 1)
    found["nobody waits"] = check("two", torch.float32, 2, 5, 1, in_turn=False)
    print(json.dumps(found))
