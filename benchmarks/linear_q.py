"""Products with quantised weights beside bf16, on one core with its weights in the cache.

``python benchmarks/linear_q.py`` writes ``benchmarks/results/linear_q.csv``. Times are the thread's own, the
best of many, so that other processes of the machine hardly show. Whether one row is at the memory's floor can
be read off ``gb_per_s``: a core's share of the memory's rate must be less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llm42c.codegen import quant
from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry
from llm42c.runtime.bench.harness import write_csv
from llm42c.runtime.bench.machine import describe

ROOT = Path(__file__).parents[1]
FORMATS = ("bf16", *(name for name in quant.FORMATS if name not in ("i4_32", "i4_64")))


def kernels() -> str:
    """The widest dot product of bytes that the kernels use here."""
    flags = set(build.cpu_features().split())
    return next((f for f in ("avx512_vnni", "avx512bw", "avx2") if f in flags), "portable")


def product(format: str, n: int, k: int) -> tuple[Callable[[torch.Tensor], object], int]:
    """A product with random weights, and their bytes."""
    ops = torch.ops.llm42
    if format == "bf16":
        packed = ops.linear_pack(torch.randn(n, k).bfloat16())
        return lambda x: ops.linear(x, packed, None, n), packed.nbytes
    form = quant.format_of(format)
    packed = torch.randint(
        0, 60, (-(-n // quant.COLUMNS), k // form.block, form.panel_bytes), dtype=torch.uint8
    )
    return lambda x: ops.linear_q(x, [packed], format, [n], None, None, False), packed.nbytes


def best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of this thread."""
    found = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        call()
        found = min(found, time.thread_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1536)
    parser.add_argument("--k", type=int, default=1536)
    parser.add_argument("--rows", default="1,2,4,8,32,256")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "linear_q.csv")
    args = parser.parse_args()
    registry.load()
    torch.set_num_threads(1)
    rows = []
    for format in FORMATS:
        call, nbytes = product(format, args.n, args.k)
        for m in map(int, args.rows.split(",")):
            x = torch.randn(m, args.k).bfloat16()
            seconds = best(lambda x=x, call=call: call(x), args.repeats)  # type: ignore[misc]
            rate = m * args.n * args.k / seconds / 1e9
            rows.append(
                {
                    "weights": format, "n": args.n, "k": args.k, "rows": m,
                    "us": round(seconds * 1e6, 1), "gmac_per_s": round(rate, 1),
                    "gb_per_s": round(nbytes / seconds / 1e9, 1),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    write_csv(args.out, rows, command="python benchmarks/linear_q.py", **describe() | {"kernels": kernels()})


if __name__ == "__main__":
    main()
