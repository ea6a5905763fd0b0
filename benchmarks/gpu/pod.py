"""Hybrid attention on a GPU: correctness, invariance and time, in one command.

    python benchmarks/gpu/pod.py [--out benchmarks/gpu/pod.csv] [--budget 420] [--dry-run]

Writes one CSV; each row is one measurement, or says why it could not be made. Within the budget (seconds):

- attention against fp64 on a small batch, within a bound from eps;
- bits of the same rows over batch mixes, schedulers and replays of a CUDA graph (0 rows may differ);
- over the grid below, every scheduler against the best serial pair of a prefill kernel and a decode kernel
  (our own, tiles tuned for each role alone; torch's SDPA and FlexAttention), against the tuned pair on two
  streams, torch's varlen attention, and FlashInfer's POD where it can be imported.

Times are the median of 20 after 3, in one process; TB/s and TFLOP/s stand beside what the card reached in a
copy and a product. ``--dry-run`` runs the same code once on the CPU at a tiny size, and writes a file only if
``--out`` names one; with ``TRITON_INTERPRET=1`` in the environment the kernels run too.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Results, gpu_or_dry, machine, options_of
from pod_baselines import SERIAL, TOGETHER
from torch import Tensor

Call = Callable[[], Any]
Case = tuple[int, int, int, int]  # chunk, its context, decodes, their context

# Llama-3-8B heads.
GRID: tuple[Case, ...] = (
    (512, 4096, 16, 4096), (512, 8192, 32, 8192), (1024, 12288, 80, 12288), (2048, 12288, 80, 12288),
    (512, 16384, 54, 16384), (512, 16384, 55, 16384), (4096, 4096, 128, 2048),
)  # fmt: skip
SCHEDULERS = ("tickets", "persistent", "partition")


@dataclass(frozen=True)
class Shape:
    """What is measured: heads, the grid, the batch of the checks, and how much is tried."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 16
    dtype: torch.dtype = torch.bfloat16
    grid: tuple[Case, ...] = GRID
    rows: tuple[int, ...] = (40, 1, 3, 300, 1)
    keys: tuple[int, ...] = (40, 700, 1200, 900, 3000)
    shares: tuple[tuple[int, int], ...] = ((1, 1), (1, 3), (3, 1))
    tuned: int = 99  # candidates for each role of the serial pair
    products: int = 8192

    @property
    def scale(self) -> float:
        return self.dim**-0.5


TINY = Shape(4, 2, 64, 16, torch.float32, ((6, 20, 2, 33),), (6, 1), (6, 40), ((1, 1),), 1, 64)


@dataclass
class Batch:
    """Packed inputs of some sequences over one paged cache, with keys already in it."""

    q: Tensor  # [T, H, D]
    k_cache: Tensor  # [pages, Hkv, D, page]
    v_cache: Tensor  # [pages, Hkv, page, D]
    cu: Tensor
    lens: Tensor
    table: Tensor
    rows: list[int]
    keys: list[int]

    @staticmethod
    def make(shape: Shape, rows: list[int], keys: list[int], device: torch.device) -> Batch:
        g = torch.Generator(device).manual_seed(0)
        page, width, sequences = shape.page, -(-max(keys) // shape.page), len(rows)
        pages = sum(-(-n // page) for n in keys)
        order = torch.randperm(pages, generator=g, device=device).int()
        table = torch.zeros(sequences, width, dtype=torch.int32, device=device)
        at = 0
        for s, n in enumerate(keys):
            used = -(-n // page)
            table[s, :used] = order[at : at + used]
            at += used

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device, dtype=shape.dtype)

        starts = torch.tensor([0, *rows], device=device).cumsum(0).int()
        return Batch(
            randn(sum(rows), shape.heads, shape.dim),
            randn(pages, shape.kv_heads, shape.dim, page), randn(pages, shape.kv_heads, page, shape.dim),
            starts, torch.tensor(keys, dtype=torch.int32, device=device), table, rows, keys,
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
        return 4.0 * seen * self.q.shape[1] * self.q.shape[2]

    def bytes(self) -> float:
        return 2.0 * sum(self.keys) * self.v_cache[0, :, 0].numel() * self.q.element_size()

    def reference(self, scale: float) -> Tensor:
        """[T, H, D] in fp64, on the CPU."""
        from llm42c.codegen.ops.paged_attention import paged_attention

        none = torch.full((len(self.q),), -1)
        empty = torch.zeros(len(self.q), self.v_cache.shape[1], self.q.shape[2], dtype=self.q.dtype)
        tensors = [self.q.cpu(), empty, empty, self.k_cache.cpu(), self.v_cache.cpu(), none, self.cu.cpu()]
        return paged_attention.reference(*tensors, self.lens.cpu(), self.table.cpu(), scale, 0, 0.0, None)


class Kernels:
    """Our kernel in any specialisation; the work list is made outside the timing, as layers share it."""

    def __init__(self, shape: Shape, results: Results) -> None:
        from llm42c.codegen.triton import attention

        self.shape, self._attention = shape, attention
        self.target = attention.device_of(results.device)
        # An interpreter has no register with the number of the multiprocessor.
        self._changes: dict[str, Any] = {"sm": "program", "sms": 2} if results.dry else {}
        self._sms = 2 if results.dry else self.target.count("sms")

    def spec(self, scheduler: str = "persistent", uniform: bool = True, **changes: Any) -> Any:
        from llm42c.codegen.triton.spec import default_spec

        s, dtype = self.shape, str(self.shape.dtype).removeprefix("torch.")
        base = default_spec(
            self.target, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.dim, page=s.page, dtype=dtype,
            scheduler=scheduler, uniform=uniform,
        )  # fmt: skip
        return replace(base, **{**self._changes, **changes})

    def call(self, b: Batch, spec: Any, share: tuple[int, int] = (1, 1)) -> Call:
        from llm42c.codegen.triton.cost import Choice

        programs = 0 if spec.scheduler == "tickets" else 2 * self._sms
        return self.chosen(b, spec, Choice(spec.scheduler, *share, programs, "benchmark"))

    def chosen(self, b: Batch, spec: Any, choice: Any) -> Call:
        most_keys = b.table.shape[1] * self.shape.page
        plan = self._attention.make_plan(spec, len(b.q), b.cu, b.lens, most_keys)
        tensors = (b.q, b.k_cache, b.v_cache, b.cu, b.lens, b.table)
        return lambda: self._attention.attend(spec, plan, choice, *tensors, self.shape.scale, 0.0, None)

    def own_choice(self, b: Batch) -> tuple[Call, str]:
        """What the cost model takes for this batch, and why."""
        from llm42c.codegen.triton.cost import Composition, choose

        decodes = len(b.rows) - 1
        found = choose(Composition(b.rows[0], b.keys[0], decodes, b.keys[1]), self.spec(), self.target)
        return self.chosen(b, self.spec(found.scheduler), found), f"{found.scheduler}: {found.reason}"

    def tiles(self, role: str) -> Iterator[tuple[str, Any]]:
        """Candidates for a role alone; what a device cannot hold is left out by the measurement."""
        default = self.spec(uniform=False)
        yield "default", default
        if role == "prefill":
            tried = [
                {"rows": rows, "keys": keys, "warps": warps, "stages": stages}
                for rows in (64, 128)
                for keys in (64, 128)
                for warps, stages in ((4, 2), (8, 2), (8, 3))
            ]
        else:
            tried = [{"keys": keys, "split": split} for keys in (32, 64, 128) for split in (256, 512, 1024)]
        for changes in tried:
            yield ", ".join(f"{name} {n}" for name, n in changes.items()), replace(default, **changes)


def differing(a: Tensor, b: Tensor) -> int:
    """Rows whose bits are not the same."""
    words = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return int((a.contiguous().view(words) != b.contiguous().view(words)).flatten(1).any(1).sum())


def bound(shape: Shape, b: Batch) -> float:
    """Of the error: a score of D products moves weights by its own error, then n products are rounded.

    The result is rounded once to its own dtype; sums are kept in fp32, and weights in the dtype of V.
    """
    small, wide = torch.finfo(shape.dtype).eps, torch.finfo(torch.float32).eps
    q, k = b.q.float().norm(dim=-1).max(), b.k_cache.float().norm(dim=2).max()
    score = 2 * shape.dim * wide * shape.scale * float(q * k)
    return float(b.v_cache.float().abs().max()) * (4 * small + 2 * score + 2 * max(b.keys) * wide)


def correctness(results: Results, shape: Shape) -> None:
    kernels = Kernels(shape, results)
    b = Batch.make(shape, list(shape.rows), list(shape.keys), results.device)
    want = b.reference(shape.scale)
    limit = bound(shape, b)

    def error(what: str, make: Callable[[], Call], want: Tensor) -> None:
        found = results.attempt(
            "correctness",
            f"error, {what}",
            "abs",
            lambda: float((make()().double().cpu() - want).abs().max()),
        )
        if found is not None:
            results.rows[-1]["note"] = f"{'within' if found <= limit else 'OVER'} the bound of {limit:.2e}"

    for scheduler in SCHEDULERS:
        for uniform in (True, False):
            spec = kernels.spec(scheduler, uniform)
            what = f"{scheduler}, {'one tile' if uniform else 'a tile a role'}"
            error(what, lambda s=spec: kernels.call(b, s), want)
    one = Batch.make(shape, [shape.rows[0], 1, 1], [max(shape.keys)] * 3, results.device)
    exact = one.reference(shape.scale)
    for name, make in {**SERIAL, **TOGETHER}.items():
        error(name, lambda m=make: m(one, shape.scale, results.dry), exact)


def invariance(results: Results, shape: Shape) -> None:
    """Rows of a sequence that differ in any bit between batches, schedulers, or replays; 0 is right."""
    kernels = Kernels(shape, results)
    b = Batch.make(shape, list(shape.rows), list(shape.keys), results.device)
    times = 1 if results.dry else 10
    for uniform in (True, False):
        label = "one tile" if uniform else "a tile a role"
        base = kernels.spec("persistent", uniform)
        whole = results.attempt(
            "invariance", f"rows compared, {label}", "rows", lambda s=base: len(kernels.call(b, s)())
        )
        if whole is None:
            continue
        want = kernels.call(b, base)()
        for scheduler in SCHEDULERS:
            for share in shape.shares:
                call = kernels.call(b, kernels.spec(scheduler, uniform), share)
                results.attempt(
                    "invariance", f"rows, {scheduler} {share[0]}:{share[1]}, {label}", "rows",
                    lambda c=call, w=want: sum(differing(c(), w) for _ in range(times)),
                )  # fmt: skip
        parts = [b.part(s, s + 1) for s in range(len(b.rows))]
        results.attempt(
            "invariance", f"rows, each alone, {label}", "rows",
            lambda s=base, w=want, p=parts: differing(torch.cat([kernels.call(x, s)() for x in p]), w),
        )  # fmt: skip
        results.attempt(
            "invariance", f"rows, graph replay, {label}", "rows",
            lambda s=base, w=want: replay(results, kernels.call(b, s), w),
        )  # fmt: skip
    results.attempt("invariance", "rows, linear over M", "rows", lambda: linear_rows(results, shape))


def replay(results: Results, call: Call, want: Tensor) -> int:
    """Rows that differ between launches and five replays of them as one graph."""
    if results.dry:
        return differing(call(), want)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    wrong = 0
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        wrong += differing(got, want)
    return wrong


def linear_rows(results: Results, shape: Shape) -> int:
    """Rows of a product that change with the number of rows."""
    from llm42c.codegen.triton.linear import linear_dense

    m, k, n = (20, 32, 16) if results.dry else (300, 4096, 1024)
    x = torch.randn(m, k, device=results.device, dtype=shape.dtype)
    w = torch.randn(n, k, device=results.device, dtype=shape.dtype)
    want = linear_dense(x, w, None)
    sizes = (1, 2, 8, 16, 17, 64, 65, 128, 129, 256)
    return sum(differing(linear_dense(x[:s], w, None), want[:s]) for s in sizes if s <= m)


@dataclass
class Timing:
    """Milliseconds by case and contender, and which of them are serial pairs or ours."""

    shape: Shape
    results: Results
    ms: dict[str, dict[str, float]]
    serial: set[str]
    ours: set[str]

    def measure(self, case: str, what: str, make: Callable[[], Call], b: Batch) -> float | None:
        """One contender; what it reaches of the card stands beside."""
        found = self.results.attempt(case, what, "ms", lambda: self.results.median_ms(make()))
        if not isinstance(found, float) or found <= 0:
            return None
        self.ms.setdefault(case, {})[what] = found
        row = self.results.rows[-1]
        row["note"] = f"{b.flops() / found / 1e9:.1f} TFLOP/s and {b.bytes() / found / 1e9:.3f} TB/s"
        return found

    def batches(self) -> Iterator[tuple[str, Batch]]:
        for chunk, context, decodes, length in self.shape.grid:
            case = f"{chunk}@{context}+{decodes}@{length}"
            if self.results.spent:
                self.results.not_run(case, "all", "ms", "the budget was spent")
                continue
            try:
                sizes = [chunk] + [1] * decodes, [context] + [length] * decodes
                b = Batch.make(self.shape, *sizes, self.results.device)
            except Exception as error:
                self.results.not_run(case, "all", "ms", error)
                continue
            yield case, b
            del b
            self.results.free()


def timing(results: Results, shape: Shape) -> None:
    """All contenders but FlexAttention over the whole grid; then FlexAttention, which compiles each shape."""
    found = Timing(shape, results, {}, set(), set())
    kernels = Kernels(shape, results)
    for case, b in found.batches():
        serial_pair(found, kernels, case, b)
        hybrid(found, kernels, case, b)
        for name, make in {"torch SDPA, two calls": SERIAL["torch SDPA, two calls"], **TOGETHER}.items():
            found.measure(case, name, lambda m=make, b=b: m(b, shape.scale, results.dry), b)
            results.free()
    name = "torch FlexAttention, two calls"
    for case, b in found.batches():
        found.measure(case, name, lambda b=b: SERIAL[name](b, shape.scale, results.dry), b)
    found.serial |= set(SERIAL)
    summary(found)


def serial_pair(found: Timing, kernels: Kernels, case: str, b: Batch) -> None:
    """Our own kernel for each role alone, with the tiles that are fastest for it, one after the other."""
    best: list[Call] = []
    for role, part in (("prefill", b.part(0, 1)), ("decode", b.part(1, len(b.rows)))):
        tried: list[tuple[float, str, Call]] = []
        for label, spec in list(kernels.tiles(role))[: found.shape.tuned]:
            if found.results.spent:
                break
            try:
                call = kernels.call(part, spec)
                tried.append((found.results.median_ms(call, times=5), label, call))
            except Exception as error:  # more than the device has
                if label == "default":
                    found.results.not_run(case, f"{role} alone", "ms", error)
                    return
        if not tried:
            return
        ms, label, call = min(tried, key=lambda t: t[0])
        found.results.add(case, f"{role} alone, best of {len(tried)}", ms, "ms", label)
        best.append(call)
    found.serial.add("our own pair, tuned")
    found.measure(case, "our own pair, tuned", lambda: lambda: [c() for c in best], b)
    found.measure(case, "our own pair, two streams", lambda: two_streams(found.results, best), b)


def hybrid(found: Timing, kernels: Kernels, case: str, b: Batch) -> None:
    for uniform in (True, False):
        for scheduler in SCHEDULERS:
            for share in found.shape.shares:
                tile = "one tile" if uniform else "a tile a role"
                what = f"{scheduler} {share[0]}:{share[1]}, {tile}"
                spec = kernels.spec(scheduler, uniform)
                found.ours.add(what)
                found.measure(case, what, lambda s=spec, p=share: kernels.call(b, s, p), b)
    reason: list[str] = []

    def own() -> Call:
        call, why = kernels.own_choice(b)
        reason.append(why)
        return call

    if found.measure(case, "the cost model's choice", own, b) is not None:
        found.results.add(case, "the cost model's reason", reason[-1], "")


def two_streams(results: Results, calls: list[Call]) -> Call:
    if results.dry:
        return lambda: [c() for c in calls]
    side = torch.cuda.Stream()

    def call() -> None:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            calls[1]()
        calls[0]()
        main.wait_stream(side)

    return call


def summary(found: Timing) -> None:
    """Ratios to the best serial pair, case by case and over the grid; what batch invariance costs."""
    ratios: dict[str, list[float]] = {}
    costs = []
    for case, ms in found.ms.items():
        pairs = {w: t for w, t in ms.items() if w in found.serial}
        if not pairs:
            found.results.not_run(case, "against the best serial pair", "x", "no serial pair ran")
            continue
        serial = min(pairs, key=lambda w: pairs[w])
        found.results.add(case, "best serial pair", pairs[serial], "ms", serial)
        mine = {w: t for w, t in ms.items() if w in found.ours}
        shown = {w: t for w, t in ms.items() if w not in found.serial and w not in found.ours}
        if mine:
            best = min(mine, key=lambda w: mine[w])
            shown["our best scheduler"] = mine[best]
            found.results.add(case, "our best scheduler", mine[best], "ms", best)
            one = [t for w, t in mine.items() if w.endswith("one tile")]
            roles = [t for w, t in mine.items() if w.endswith("a tile a role")]
            costs += [min(one) / min(roles)] if one and roles else []
        for what, t in shown.items():
            ratios.setdefault(what, []).append(pairs[serial] / t)
            found.results.add(case, what, pairs[serial] / t, "x serial")
    for what, each in ratios.items():
        note = f"least {min(each):.3f}, most {max(each):.3f}, of {len(each)} cases"
        found.results.add("grid", what, statistics.geometric_mean(each), "x serial", note)
    if costs:
        note = "time of one tile for both roles over that of a tile a role"
        found.results.add("grid", "what batch invariance costs", statistics.geometric_mean(costs), "x", note)


def ceilings(results: Results, shape: Shape) -> None:
    """What the card reaches in a copy and in a product, to stand beside what attention reaches."""
    n = shape.products
    out_of = torch.ones(n * n * 2, device=results.device)
    into = torch.empty_like(out_of)
    ms = results.median_ms(lambda: into.copy_(out_of))
    note = f"copy of {out_of.nbytes >> 20} MiB, read and write"
    results.add("ceiling", "memory", 2 * out_of.nbytes / ms / 1e9, "TB/s", note)
    a = torch.randn(n, n, device=results.device, dtype=shape.dtype)
    ms = results.median_ms(lambda: a @ a)
    results.add("ceiling", "matrix product", 2 * n**3 / ms / 1e9, "TFLOP/s", f"{n} cubed, {shape.dtype}")


def main() -> int:
    default = Path(__file__).with_name("pod.csv")
    options = options_of(__doc__, default).parse_args()
    if not gpu_or_dry(options, default):
        return 1
    results = Results(options.budget, options.dry_run)
    shape = TINY if options.dry_run else Shape()
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        print("without TRITON_INTERPRET=1 our own kernels are not run")
    status = 0
    for step in (lambda r, s: machine(r), ceilings, correctness, invariance, timing):
        try:
            step(results, shape)
        except Exception as error:
            results.not_run(getattr(step, "__name__", "machine"), "stopped", "", error)
            status = 1
        results.write(options.out)
        results.free()
    return status


if __name__ == "__main__":
    sys.exit(main())
