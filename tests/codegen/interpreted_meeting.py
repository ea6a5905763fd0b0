"""Two processes run the fused kernels in Triton's interpreter, meetings included, on shared memory.

Each process is a rank; programs run one after the other, so a program that read what another program of the
peer has yet to write would get it wrong. Several launches follow each other without resetting anything.
Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

WORLD, ROWS, H, GRID, LAUNCHES = 2, 7, 24, 2, 3
EPS, OFFSET = 1e-5, 0.0


def partial(rank: int, launch: int) -> Tensor:
    return torch.randn(ROWS, H, generator=torch.Generator().manual_seed(10 * launch + rank))


def common(launch: int) -> tuple[Tensor, Tensor]:
    """residual [R, H], weight [H]"""
    g = torch.Generator().manual_seed(1000 + launch)
    return torch.randn(ROWS, H, generator=g), torch.randn(H, generator=g)


def rank_main(rank: int, form: Any, buffers: list[Tensor], pads: list[Tensor], out: Tensor) -> None:
    """Launch, and leave whether each launch's sums were right in ``out[rank]``."""
    from llm42c.codegen.triton import kernel
    from llm42c.codegen.triton.all_reduce_norm import FusedSpec, emit

    torch.set_num_threads(1)
    spec = FusedSpec(H, "float32", WORLD, form)
    fn = kernel.load("all_reduce_norm", emit(spec))
    tables = [torch.tensor([t.data_ptr() for t in tensors]) for tensors in (buffers, pads)]
    chunk = -(-ROWS // WORLD)
    for launch in range(LAUNCHES):
        residual, weight = common(launch)
        buffers[rank].copy_(partial(rank, launch))
        expected = residual + (partial(0, launch) + partial(1, launch))
        if form == "shard":
            residual, expected = (t[rank * chunk : (rank + 1) * chunk] for t in (residual, expected))
        y, total = torch.empty(ROWS, H), torch.empty_like(residual)
        fn[(GRID,)](
            tables[0].data_ptr(), tables[1].data_ptr(), residual, weight, y, total, ROWS, H, EPS, OFFSET,
            rank, num_warps=1,
        )  # fmt: skip
        whole = common(launch)[0] + (partial(0, launch) + partial(1, launch))
        normed = whole * torch.rsqrt(whole.square().mean(-1, keepdim=True) + EPS) * weight
        out[rank, launch, 0] = float(torch.equal(total, expected))
        out[rank, launch, 1] = float((y - normed).abs().max())


def run(form: str) -> dict[str, Any]:
    buffers = [torch.zeros(ROWS, H).share_memory_() for _ in range(WORLD)]
    pads = [torch.zeros(GRID * WORLD, dtype=torch.int32).share_memory_() for _ in range(WORLD)]
    out = torch.zeros(WORLD, LAUNCHES, 2).share_memory_()
    mp.spawn(rank_main, (form, buffers, pads, out), nprocs=WORLD)
    return {
        "exact": bool(out[..., 0].all()),
        "error": float(out[..., 1].max()),
        "flags_left": sum(int(pad.count_nonzero()) for pad in pads),
    }


if __name__ == "__main__":
    print(json.dumps({form: run(form) for form in sys.argv[1:]}))
