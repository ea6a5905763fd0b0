"""What does fixed-order attention over paged KV cost, next to stock SDPA on dense KV?

    python benchmarks/attention.py [--dtype bfloat16] [--threads 2] [--csv benchmarks/results/attention.csv]

Each case is run over copies of its caches that together exceed the processor's, as the layers of a model
do. ``sdpa`` is ``F.scaled_dot_product_attention`` on dense tensors of the same lengths, one call for all
sequences of a length (it has no paged or ragged form, so hybrid batches take several calls). GFLOP/s
counts causal work only; GB/s counts reading the keys and values once.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llm42c.codegen.ops import registry

CACHE_BYTES = 192 << 20  # more than the last-level cache of any machine this is likely to run on
MAX_COPIES = 30
PAGE = 16
SMOLLM2, LLAMA_8B = (9, 3, 64), (32, 8, 128)  # query heads, KV heads, head_dim


@dataclass(frozen=True)
class Case:
    name: str
    heads: tuple[int, int, int]
    sequences: tuple[tuple[int, int], ...]  # rows of the call, total length

    def flops(self) -> float:
        keys = sum(n * (total - n) + n * (n + 1) // 2 for n, total in self.sequences)
        return 4.0 * keys * self.heads[0] * self.heads[2]

    def kv_bytes(self, dtype: torch.dtype) -> int:
        return 2 * sum(total for _, total in self.sequences) * self.heads[1] * self.heads[2] * dtype.itemsize


CASES = (
    Case("prefill 512", SMOLLM2, ((512, 512),)),
    Case("prefill 512 of 2048", SMOLLM2, ((512, 2048),)),
    Case("decode 1 at 100", SMOLLM2, ((1, 100),)),
    Case("decode 1 at 1500", SMOLLM2, ((1, 1500),)),
    Case("decode 8 at 300", SMOLLM2, ((1, 300),) * 8),
    Case("decode 32 at 100", SMOLLM2, ((1, 100),) * 32),
    Case("decode 32 at 1500", SMOLLM2, ((1, 1500),) * 32),
    Case("verify 8 x 16 at 300", SMOLLM2, ((16, 300),) * 8),
    Case("hybrid 256 + 31 decodes at 500", SMOLLM2, ((256, 512),) + ((1, 500),) * 31),
    Case("prefill 512 of 2048", LLAMA_8B, ((512, 2048),)),
    Case("decode 16 at 2048", LLAMA_8B, ((1, 2048),) * 16),
)


@dataclass(frozen=True)
class Row:
    case: str
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    threads: int
    us: float
    sdpa_us: float
    gflop_per_s: float
    gb_per_s: float


def paged_arguments(case: Case, dtype: torch.dtype, seed: int) -> list[object]:
    """One layer's call; pages are scattered over the cache."""
    q_heads, kv_heads, dim = case.heads
    rows = sum(n for n, _ in case.sequences)
    pages = [-(-total // PAGE) for _, total in case.sequences]
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(pages), generator=g).int().split(pages)
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    slots, cu = [], [0]
    for s, ((n, total), own) in enumerate(zip(case.sequences, order, strict=True)):
        table[s, : len(own)] = own
        position = torch.arange(total - n, total)
        slots.append(own[position // PAGE].long() * PAGE + position % PAGE)
        cu.append(cu[-1] + n)
    return [
        *(torch.randn(rows, h, dim, generator=g).to(dtype) for h in (q_heads, kv_heads, kv_heads)),
        torch.randn(sum(pages), kv_heads, dim, PAGE, generator=g).to(dtype),
        torch.randn(sum(pages), kv_heads, PAGE, dim, generator=g).to(dtype),
        torch.cat(slots),
        torch.tensor(cu, dtype=torch.int32),
        torch.tensor([total for _, total in case.sequences], dtype=torch.int32),
        *(table, 1 / math.sqrt(dim), 0, 0.0, None),
    ]


def sdpa_calls(case: Case, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """The same attention on dense tensors, a call for each kind of sequence."""
    q_heads, kv_heads, dim = case.heads
    calls: list[Callable[[], Tensor]] = []
    for (n, total), count in Counter(case.sequences).items():
        q = torch.randn(count, q_heads, n, dim).to(dtype)
        k, v = (torch.randn(count, kv_heads, total, dim).to(dtype) for _ in range(2))
        mask = None
        if 1 < n < total:
            mask = torch.arange(total) <= torch.arange(total - n, total)[:, None]
        calls.append(
            lambda q=q, k=k, v=v, mask=mask, causal=n == total > 1: F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
            )
        )
    return calls


def least_time(run: Callable[[], object], seconds: float) -> float:
    """Of at least three runs, within a budget of time."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(case: Case, dtype: torch.dtype, seconds: float) -> Row:
    copies = max(1, min(MAX_COPIES, CACHE_BYTES // case.kv_bytes(dtype)))
    layers = [paged_arguments(case, dtype, seed) for seed in range(copies)]
    dense = [sdpa_calls(case, dtype) for _ in range(copies)]

    def paged() -> None:
        for layer in layers:
            torch.ops.llm42.paged_attention(*layer)

    def sdpa() -> None:
        for calls in dense:
            for call in calls:
                call()

    ours, theirs = least_time(paged, seconds) / copies, least_time(sdpa, seconds) / copies
    name = str(dtype).removeprefix("torch.")
    rates = case.flops() / ours / 1e9, case.kv_bytes(dtype) / ours / 1e9
    return Row(case.name, *case.heads, name, torch.get_num_threads(), ours * 1e6, theirs * 1e6, *rates)


def show(rows: Sequence[Row]) -> None:
    print(f"{'case':32} {'heads':>10} {'dtype':>9} {'us':>9} {'sdpa us':>9} {'GFLOP/s':>8} {'GB/s':>6}")
    for r in rows:
        heads = f"{r.q_heads}/{r.kv_heads}x{r.head_dim}"
        numbers = f"{r.us:9.1f} {r.sdpa_us:9.1f} {r.gflop_per_s:8.1f} {r.gb_per_s:6.1f}"
        print(f"{r.case:32} {heads:>10} {r.dtype:>9} {numbers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="budget of one measurement")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    registry.load()
    with torch.inference_mode():
        rows = [measure(c, getattr(torch, name), options.seconds) for name in options.dtype for c in CASES]
    show(rows)
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(
                {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows
            )


if __name__ == "__main__":
    main()
