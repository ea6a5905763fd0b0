"""How close do the packed linears come to what the machine can do?

    python benchmarks/linear.py [--rows 1 8 32 256] [--dtype bfloat16] [--csv benchmarks/results/linear.csv]

Every product is run over copies of its weight that together exceed the caches, as the layers of a model
do. The floor of a product is the greater of: reading its weights once at the memory bandwidth, and doing
its multiplications at the peak of its dtype; both are measured here first, the peak by the kernels' own
step of a chain on registers. ``eager`` is ``F.linear``. ``LLM42_ISA`` chooses the instruction set; with
``--append``, the table gets the rows of another one.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import itertools
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry
from llm42c.runtime.bench.machine import describe

CACHE_BYTES = 192 << 20  # more than the last-level cache of any machine this is likely to run on
SMOLLM2 = {"qkv": (576, 960, 30), "o": (576, 576, 30), "gate_up": (576, 3072, 30), "down": (1536, 576, 30)}
HEAD = {"head": (576, 49152, 1)}
# As many chains as hide the latency of a step, on registers alone.
PEAK = """
#include "kernels/element.h"
#include "kernels/parallel.h"
using namespace llm42;
template <class Factor, int... I>
inline long burst(Factor x, long steps, float* out, std::integer_sequence<int, I...>) {
  Vec acc[] = {Vec::load(out + I * kLanes)...};
  for (long i = 0; i < steps; i++) ((acc[I] = fma(x, x, acc[I])), ...);
  (acc[I].store(out + I * kLanes), ...);
  return steps * long(sizeof...(I)) * kLanes;
}
constexpr std::make_integer_sequence<int, kRegisters / 4 * 3> kChains{};
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT long fp32(long steps, float* out) { return burst(Vec::set1(out[0]), steps, out, kChains); }
EXPORT long bf16_pairs(long steps, float* out) {
  const FloatMode<kPairsByMode> mode;
  PairX x;
  std::memcpy(&x, out, sizeof x);
  return burst(pair_factor(x), steps, out, kChains) * 2 / kPairSteps;
}
EXPORT const char* isa() { return LLM42_ISA_NAME; }
"""


@dataclass(frozen=True)
class Floor:
    """Bytes and multiply-adds a second."""

    cpu: str
    isa: str
    bandwidth: float
    peaks: dict[str, float]

    def seconds(self, nbytes: float, macs: float, dtype: str) -> float:
        return max(nbytes / self.bandwidth, macs / self.peak(dtype))

    def peak(self, dtype: str) -> float:
        return self.peaks["bf16_pairs" if dtype == "bfloat16" else "fp32"]


@dataclass(frozen=True)
class Row:
    cpu: str
    isa: str
    product: str
    k: int
    n: int
    rows: int
    dtype: str
    threads: int
    ms: float
    eager_ms: float
    gb_per_s: float
    gmac_per_s: float
    share_of_peak: float
    floor_ms: float
    share_of_floor: float


def best_of(run: Callable[[], object], seconds: float) -> float:
    """Least time of one run, within a budget of time and at least three runs; of one thread, its CPU time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def peak_library() -> ctypes.CDLL:
    """``PEAK`` for the chosen instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(PEAK)
        flags = [*build.FLAGS, *build._ISA_FLAGS[build.chosen_isa()], f"-I{build.SOURCE_DIR}", "-shared"]
        subprocess.run([build.Toolchain.find().compiler, *flags, source, "-o", library], check=True)
        found = ctypes.CDLL(str(library))
    found.fp32.restype = found.bf16_pairs.restype = ctypes.c_long
    found.isa.restype = ctypes.c_char_p
    return found


def measure_floor(seconds: float) -> Floor:
    memory = torch.ones(CACHE_BYTES // 4)
    bandwidth = memory.nbytes / best_of(lambda: memory.sum(), seconds)
    library, threads, steps = peak_library(), torch.get_num_threads(), 100_000
    outs = [torch.zeros(1024) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:  # a call of ctypes lets the other threads run

        def macs(function: Callable[..., int]) -> int:
            every = map if threads == 1 else pool.map
            return sum(
                every(lambda out: function(ctypes.c_long(steps), ctypes.c_void_p(out.data_ptr())), outs)
            )

        def peak(function: Callable[..., int]) -> float:
            return macs(function) / best_of(lambda: macs(function), seconds)

        peaks = {name: peak(getattr(library, name)) for name in ("fp32", "bf16_pairs")}
    return Floor(describe()["cpu"], library.isa().decode(), bandwidth, peaks)


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
    name = str(dtype).removeprefix("torch.")
    macs, lowest = m * n * k, floor.seconds(weight.nbytes, m * n * k, name)
    yield Row(
        floor.cpu,
        floor.isa,
        product,
        k,
        n,
        m,
        name,
        torch.get_num_threads(),
        round(1e3 * ours, 4),
        round(1e3 * eager, 4),
        round(weight.nbytes / ours / 1e9, 2),
        round(macs / ours / 1e9, 1),
        round(macs / ours / floor.peak(name), 3),
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
    gigamacs = sum(c * r.gmac_per_s * r.ms for c, r in parts) / 1e3
    share = sum(c * r.share_of_peak * r.ms for c, r in parts) / ms
    return Row(
        first.cpu,
        first.isa,
        "step",
        0,
        0,
        first.rows,
        first.dtype,
        first.threads,
        round(ms, 3),
        round(eager, 3),
        round(gigabytes / ms * 1e3, 2),
        round(gigamacs / ms * 1e3, 1),
        round(share, 3),
        round(lowest, 3),
        round(lowest / ms, 3),
    )


def show(row: Row) -> None:
    print(
        f"{row.product:8} {row.k:5} {row.n:6} {row.rows:5} {row.dtype:9} {row.ms:9.3f} {row.eager_ms:9.3f}"
        f" {row.gb_per_s:7.1f} {row.gmac_per_s:8.1f} {row.share_of_peak:6.0%} {row.share_of_floor:6.0%}",
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
    parser.add_argument("--append", action="store_true", help="add to the file instead")
    args = parser.parse_args()
    registry.load()
    torch.set_num_threads(args.threads)
    table: list[Row] = []
    with torch.inference_mode():
        floor = measure_floor(args.seconds)
        rates = ", ".join(f"{name} {peak / 1e9:.0f} GMAC/s" for name, peak in floor.peaks.items())
        print(f"{floor.cpu}, {floor.isa}: memory {floor.bandwidth / 1e9:.1f} GB/s, {rates}")
        print("product      k      n  rows dtype            ms  eager ms    GB/s   GMAC/s   peak  floor")
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
        with args.csv.open("a" if args.append else "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*asdict(table[0]), "command"])
            if not args.append:
                writer.writeheader()
            command = f"LLM42_ISA={build.chosen_isa()} python {shlex.join(sys.argv)}"
            writer.writerows(asdict(row) | {"command": command} for row in table)


if __name__ == "__main__":
    main()
