"""How close do the packed linears come to what the machine can do?

    python benchmarks/linear.py [--rows 1 8 32 256] [--dtype bfloat16] [--csv benchmarks/results/linear.csv]

Every product is run over copies of its weight that together exceed the caches, as the layers of a model
do. The floor of a product is the greater of: reading its weights once at the memory bandwidth, and doing
its multiplications at the peak of fp32; both are measured here first. ``eager`` is ``F.linear``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm42c.codegen.ops import registry

CACHE_BYTES = 192 << 20  # more than the last-level cache of any machine this is likely to run on
SMOLLM2 = {"qkv": (576, 960, 30), "o": (576, 576, 30), "gate_up": (576, 3072, 30), "down": (1536, 576, 30)}
HEAD = {"head": (576, 49152, 1)}


@dataclass(frozen=True)
class Floor:
    """Bytes and floating-point operations a second."""

    bandwidth: float
    peak: float

    def seconds(self, nbytes: float, flops: float) -> float:
        return max(nbytes / self.bandwidth, flops / self.peak)


@dataclass(frozen=True)
class Row:
    product: str
    k: int
    n: int
    rows: int
    dtype: str
    threads: int
    ms: float
    eager_ms: float
    gb_per_s: float
    gflop_per_s: float
    floor_ms: float
    share_of_floor: float


def best_of(run: Callable[[], object], seconds: float) -> float:
    """Least time of one run, within a budget of time and at least three runs."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_floor(seconds: float) -> Floor:
    memory = torch.ones(CACHE_BYTES // 4)
    a = torch.randn(1024, 1024)
    bandwidth = memory.nbytes / best_of(lambda: memory.sum(), seconds)
    return Floor(bandwidth, 2 * 1024**3 / best_of(lambda: a @ a, seconds))


def cycle(run: Callable[[Tensor], object], weights: Sequence[Tensor]) -> Callable[[], None]:
    """One run of every weight."""

    def once() -> None:
        for w in weights:
            run(w)

    return once


def measure(
    product: str, k: int, n: int, m: int, dtype: torch.dtype, floor: Floor, seconds: float
) -> Iterable[Row]:
    x = torch.randn(m, k).to(dtype)
    weight = torch.randn(n, k).to(dtype)
    copies = -(-CACHE_BYTES // weight.nbytes)
    packed = [torch.ops.llm42.linear_pack(weight) for _ in range(copies)]
    ours = best_of(cycle(lambda w: torch.ops.llm42.linear(x, w, None, n), packed), seconds) / copies
    del packed
    dense = [weight.clone() for _ in range(copies)]
    eager = best_of(cycle(lambda w: F.linear(x, w), dense), seconds) / copies
    flops, lowest = 2 * m * n * k, floor.seconds(weight.nbytes, 2 * m * n * k)
    yield Row(
        product,
        k,
        n,
        m,
        str(dtype).removeprefix("torch."),
        torch.get_num_threads(),
        round(1e3 * ours, 4),
        round(1e3 * eager, 4),
        round(weight.nbytes / ours / 1e9, 2),
        round(flops / ours / 1e9, 1),
        round(1e3 * lowest, 4),
        round(lowest / ours, 3),
    )


def whole_step(rows: Iterable[Row]) -> Row:
    """All products of one forward pass of SmolLM2-135M."""
    counts = {name: count for name, (_, _, count) in (SMOLLM2 | HEAD).items()}
    parts = [(counts[r.product], r) for r in rows]
    first = parts[0][1]
    ms, eager, lowest = (
        sum(c * getattr(r, field) for c, r in parts) for field in ("ms", "eager_ms", "floor_ms")
    )
    gigabytes = sum(c * r.gb_per_s * r.ms for c, r in parts) / 1e3
    gigaflops = sum(c * r.gflop_per_s * r.ms for c, r in parts) / 1e3
    return Row(
        "step",
        0,
        0,
        first.rows,
        first.dtype,
        first.threads,
        round(ms, 3),
        round(eager, 3),
        round(gigabytes / ms * 1e3, 2),
        round(gigaflops / ms * 1e3, 1),
        round(lowest, 3),
        round(lowest / ms, 3),
    )


def show(row: Row) -> None:
    print(
        f"{row.product:8} {row.k:5} {row.n:6} {row.rows:5} {row.dtype:9} {row.ms:9.3f} {row.eager_ms:9.3f}"
        f" {row.gb_per_s:7.1f} {row.gflop_per_s:8.1f} {row.share_of_floor:6.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each measurement")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    args = parser.parse_args()
    registry.load()
    torch.set_num_threads(args.threads)
    table: list[Row] = []
    with torch.inference_mode():
        floor = measure_floor(args.seconds)
        print(f"memory {floor.bandwidth / 1e9:.1f} GB/s, fp32 {floor.peak / 1e9:.0f} GFLOP/s")
        print("product      k      n  rows dtype            ms  eager ms    GB/s  GFLOP/s  floor")
        for dtype, m in itertools.product(args.dtype, args.rows):
            step: list[Row] = []
            for name, (k, n, _) in (SMOLLM2 | HEAD).items():
                for row in measure(name, k, n, m, getattr(torch, dtype), floor, args.seconds):
                    step.append(row)
                    show(row)
            step.append(whole_step(step))
            show(step[-1])
            table += step
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(table[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in table)


if __name__ == "__main__":
    main()
