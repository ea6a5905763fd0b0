"""Hybrid attention on a GPU: correctness, invariance and time, in one command.

    python benchmarks/gpu/pod.py [--out benchmarks/gpu/pod.csv] [--budget 420]

Writes one CSV; each row is one measurement, or says why it could not be made. Within the budget (seconds):
attention against fp64 on a small batch; bits of the same rows over batch mixes, schedulers and replays of a
CUDA graph; then, over the grid below, each scheduler against a serial prefill call and decode call, the two
on two streams, torch's SDPA a sequence, and FlashInfer's POD where it can be imported. Times are the median
of 20 after 3, in one process; TB/s and TFLOP/s stand beside what the card reached in a copy and a product.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# (chunk, its context, decodes, their context); Llama-3-8B heads
GRID = (
    (512, 4096, 16, 4096), (512, 8192, 32, 8192), (1024, 12288, 80, 12288), (2048, 12288, 80, 12288),
    (512, 16384, 54, 16384), (512, 16384, 55, 16384), (4096, 4096, 128, 2048),
)  # fmt: skip
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16


@dataclass
class Batch:
    """Packed inputs of some sequences over one paged cache, with keys already in it."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cu: Tensor
    lens: Tensor
    table: Tensor
    rows: list[int]
    keys: list[int]

    @staticmethod
    def make(rows: list[int], keys: list[int], dtype: torch.dtype, seed: int = 0) -> Batch:
        g = torch.Generator("cuda").manual_seed(seed)
        width, sequences = -(-max(keys) // PAGE), len(rows)
        pages = sum(-(-n // PAGE) for n in keys)
        order = torch.randperm(pages, generator=g, device="cuda").int()
        table = torch.zeros(sequences, width, dtype=torch.int32, device="cuda")
        at = 0
        for s, n in enumerate(keys):
            used = -(-n // PAGE)
            table[s, :used] = order[at : at + used]
            at += used

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device="cuda", dtype=dtype)

        starts = torch.tensor([0, *rows], device="cuda").cumsum(0).int()
        return Batch(
            randn(sum(rows), HEADS, DIM),
            randn(pages, KV_HEADS, DIM, PAGE), randn(pages, KV_HEADS, PAGE, DIM),
            starts, torch.tensor(keys, dtype=torch.int32, device="cuda"), table, rows, keys,
        )  # fmt: skip

    def part(self, begin: int, end: int) -> Batch:
        """Sequences from begin to end, over the same cache."""
        cu = self.cu[begin : end + 1]
        q = self.q[sum(self.rows[:begin]) : sum(self.rows[:end])]
        return replace(
            self, q=q, cu=(cu - cu[0]).int(), lens=self.lens[begin:end].contiguous(),
            table=self.table[begin:end].contiguous(), rows=self.rows[begin:end], keys=self.keys[begin:end],
        )  # fmt: skip

    def flops(self) -> float:
        seen = sum(r * k - r * (r - 1) / 2 for r, k in zip(self.rows, self.keys, strict=True))
        return 4.0 * seen * HEADS * DIM

    def bytes(self) -> float:
        return 2.0 * sum(self.keys) * KV_HEADS * DIM * self.q.element_size()

    def reference(self) -> Tensor:
        from llm42c.codegen.ops.paged_attention import reference

        none = torch.full((len(self.q),), -1)
        empty = torch.zeros(len(self.q), KV_HEADS, DIM, dtype=self.q.dtype)
        tensors = [self.q.cpu(), empty, empty, self.k_cache.cpu(), self.v_cache.cpu(), none, self.cu.cpu()]
        return reference(*tensors, self.lens.cpu(), self.table.cpu(), DIM**-0.5, 0, 0.0, None)


class Runner:
    """One specialisation of our kernel, with the work list made outside the timing, as layers share it."""

    def __init__(self, scheduler: str, uniform: bool, shares: tuple[int, int] = (1, 1)) -> None:
        from llm42c.codegen.triton import attention
        from llm42c.codegen.triton.cost import Choice
        from llm42c.codegen.triton.spec import default_spec

        self.attention = attention
        target = attention.target_of(torch.device("cuda", 0))
        self.spec = default_spec(
            target, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, page=PAGE, dtype="bfloat16",
            scheduler=scheduler, uniform=uniform,
        )  # fmt: skip
        programs = 0 if scheduler == "tickets" else target.count("sms") * 2
        self.choice = Choice(scheduler, *shares, programs, "benchmark")

    def prepare(self, b: Batch) -> Callable[[], Tensor]:
        plan = self.attention.make_plan(self.spec, len(b.q), b.cu, b.lens, b.table.shape[1])
        tensors = (b.q, b.k_cache, b.v_cache, b.cu, b.lens, b.table)
        return lambda: self.attention.attend(self.spec, plan, self.choice, *tensors, DIM**-0.5, 0.0, None)


def median_ms(call: Callable[[], Any]) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


class Results:
    """Rows of the CSV; a failure is a row too."""

    def __init__(self, budget: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self.end = time.monotonic() + budget

    def add(self, case: str, what: str, value: object, unit: str, note: str = "") -> None:
        self.rows.append({"case": case, "what": what, "value": value, "unit": unit, "note": note})
        print(f"{case:<28}{what:<28}{value!s:>14} {unit:<8}{note}", flush=True)

    def attempt(self, case: str, what: str, unit: str, call: Callable[[], object]) -> object:
        if time.monotonic() > self.end:
            self.add(case, what, "", unit, "not run: the budget was spent")
            return None
        try:
            value = call()
        except Exception as error:
            self.add(case, what, "", unit, f"not run: {type(error).__name__}: {str(error)[:120]}")
            return None
        self.add(case, what, round(value, 4) if isinstance(value, float) else value, unit)
        return value

    def write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["case", "what", "value", "unit", "note"])
            writer.writeheader()
            writer.writerows(self.rows)


def correctness(results: Results) -> None:
    b = Batch.make([40, 1, 3, 300, 1], [40, 700, 1200, 900, 3000], torch.bfloat16)
    want = b.reference()

    def error(scheduler: str, uniform: bool) -> float:
        return float((Runner(scheduler, uniform).prepare(b)().double().cpu() - want).abs().max())

    for scheduler in ("tickets", "persistent", "partition"):
        for uniform in (True, False):
            name = f"{scheduler}, {'one tile' if uniform else 'a tile a role'}"
            results.attempt(
                "correctness", f"error, {name}", "abs", lambda s=scheduler, u=uniform: error(s, u)
            )


def invariance(results: Results) -> None:
    """Rows of a sequence that differ in any bit between batches, schedulers, or replays; 0 is right."""
    b = Batch.make([40, 1, 3, 300, 1], [40, 700, 1200, 900, 3000], torch.bfloat16)

    def differing(a: Tensor, c: Tensor) -> int:
        return int((a.view(torch.int16) != c.view(torch.int16)).flatten(1).any(1).sum())

    for uniform in (True, False):
        whole = Runner("persistent", uniform).prepare(b)()
        label = "one tile" if uniform else "a tile a role"
        for scheduler in ("tickets", "persistent", "partition"):
            for shares in ((1, 1), (3, 1)):
                run = Runner(scheduler, uniform, shares).prepare(b)
                results.attempt(
                    "invariance", f"rows, {scheduler} {shares}, {label}", "rows",
                    lambda r=run, w=whole: sum(differing(r(), w) for _ in range(10)),
                )  # fmt: skip
        alone = [Runner("persistent", uniform).prepare(b.part(s, s + 1))() for s in range(5)]
        results.attempt(
            "invariance",
            f"rows, each alone, {label}",
            "rows",
            lambda a=alone, w=whole: differing(torch.cat(a), w),
        )
        results.attempt(
            "invariance", f"rows, graph replay, {label}", "rows", lambda u=uniform: replay(b, u, differing)
        )
    results.attempt("invariance", "rows, linear M 1..300", "rows", linear_rows)


def replay(b: Batch, uniform: bool, differing: Callable[[Tensor, Tensor], int]) -> int:
    run = Runner("persistent", uniform).prepare(b)
    want = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    wrong = 0
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        wrong += differing(got, want)
    return wrong


def linear_rows() -> int:
    """Rows of a product that change with the number of rows."""
    from llm42c.codegen.triton.linear import linear_dense

    x = torch.randn(300, 4096, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
    want = linear_dense(x, w, None)
    wrong = 0
    for m in (1, 2, 8, 16, 17, 64, 65, 128, 129, 256):
        wrong += int(
            (linear_dense(x[:m], w, None).view(torch.int16) != want[:m].view(torch.int16)).any(1).sum()
        )
    return wrong


def timing(results: Results) -> None:
    for chunk, context, decodes, length in GRID:
        case = f"{chunk}@{context}+{decodes}@{length}"
        if time.monotonic() > results.end:
            results.add(case, "all", "", "ms", "not run: the budget was spent")
            continue
        try:
            b = Batch.make([chunk] + [1] * decodes, [context] + [length] * decodes, torch.bfloat16)
        except torch.cuda.OutOfMemoryError as error:
            results.add(case, "all", "", "ms", f"not run: {str(error)[:80]}")
            continue
        compare(results, case, b)
        del b
        torch.cuda.empty_cache()


def compare(results: Results, case: str, b: Batch) -> None:
    first, rest = b.part(0, 1), b.part(1, len(b.rows))
    serial: list[float] = []
    for uniform in (True, False):
        label = "one tile" if uniform else "a tile a role"
        pair = [Runner("persistent", uniform).prepare(p) for p in (first, rest)]
        ms = results.attempt(
            case, f"serial pair, {label}", "ms", lambda p=pair: median_ms(lambda: [c() for c in p])
        )
        serial += [ms] if isinstance(ms, float) else []
        results.attempt(case, f"two streams, {label}", "ms", lambda p=pair: median_ms(lambda: two_streams(p)))
        for scheduler in ("tickets", "persistent", "partition"):
            for shares in ((1, 1), (1, 3), (3, 1)):
                run = Runner(scheduler, uniform, shares).prepare(b)
                what = f"{scheduler} {shares[0]}:{shares[1]}, {label}"
                ms = results.attempt(case, what, "ms", lambda r=run: median_ms(r))
                if isinstance(ms, float):
                    note = f"{b.flops() / ms / 1e9:.0f} TFLOP/s and {b.bytes() / ms / 1e9:.2f} TB/s"
                    best = f"{min(serial) / ms:.3f}" if serial else ""
                    results.add(case, what, best, "x serial", note)
    results.attempt(case, "torch SDPA a role", "ms", lambda: sdpa(b))
    results.attempt(case, "FlashInfer POD", "ms", flashinfer)


_side: list[torch.cuda.Stream] = []


def two_streams(calls: list[Callable[[], Tensor]]) -> None:
    if not _side:
        _side.append(torch.cuda.Stream())
    main = torch.cuda.current_stream()
    _side[0].wait_stream(main)
    with torch.cuda.stream(_side[0]):
        calls[1]()
    calls[0]()
    main.wait_stream(_side[0])


def sdpa(b: Batch) -> float:
    """Contiguous keys, so without the cost of pages: the prefill, then all decodes in one call."""
    import torch.nn.functional as F
    from torch.nn.attention.bias import causal_lower_right

    def dense(n: int, keys: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((HEADS, n), (KV_HEADS, keys), (KV_HEADS, keys))
        q, k, v = (torch.randn(batch, h, s, DIM, device="cuda", dtype=b.q.dtype) for h, s in shapes)
        return (
            q,
            k.repeat_interleave(HEADS // KV_HEADS, 1) if n > 1 else k,
            (v.repeat_interleave(HEADS // KV_HEADS, 1) if n > 1 else v),
        )

    prefill, decode = dense(b.rows[0], b.keys[0], 1), dense(1, b.keys[1], len(b.rows) - 1)
    mask = causal_lower_right(b.rows[0], b.keys[0])

    def both() -> None:
        F.scaled_dot_product_attention(*prefill, attn_mask=mask)
        F.scaled_dot_product_attention(*decode, enable_gqa=True)

    return median_ms(both)


def flashinfer() -> float:
    import flashinfer  # noqa: F401

    raise NotImplementedError("the call of this version of FlashInfer is not written yet")


def ceilings(results: Results) -> None:
    from llm42c.codegen import target as targets

    found = targets.measure(targets.detect("cuda"), "cuda")
    results.add("device", found.name, found.get("memory_bandwidth") / 1e12, "TB/s", "copy of 1 GiB")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    ms = median_ms(lambda: a @ a)
    results.add("device", "bf16 product of 8192", round(2 * 8192**3 / ms / 1e9), "TFLOP/s")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pod.csv"))
    parser.add_argument("--budget", type=float, default=420.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured and no file was written")
        return 1
    results = Results(options.budget)
    for step in (ceilings, correctness, invariance, timing):
        try:
            step(results)
        except Exception as error:
            results.add(step.__name__, "stopped", "", "", f"{type(error).__name__}: {str(error)[:200]}")
        results.write(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
