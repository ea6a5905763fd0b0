"""The fused all-reduce + residual + RMSNorm on one GPU, and what splitting a product in two costs.

    python benchmarks/gpu/fused_norm.py [--out benchmarks/gpu/fused_norm.csv] [--budget 300] [--dry-run]

One GPU has no other to talk to, so this is the kernel's own cost: at world size 1, in each form, against
the residual addition and norm alone, with the bits compared. Then matrix products of a tensor-parallel
layer: whole, and as two halves of the tokens at several splits, since a split that leaves a wave of tiles
half empty costs what weaving hopes to win. What only several GPUs can tell (the meetings between ranks, the
switch) is printed as not run. Times are the median of 20 after 3. ``--dry-run`` lists the cases, emits every
kernel and measures nothing; it needs no GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = (1, 8, 64, 256, 1024, 4096, 8192)
SIZES = (2048, 4096, 8192)
# (name, K, N) of a Llama-3-70B layer on 8 ranks
PRODUCTS = (("qkv", 8192, 1280), ("o", 1024, 8192), ("gate_up", 8192, 7168), ("down", 3584, 8192))
TOKENS = (1024, 2048, 4096, 8192)
EPS = 1e-5
ONLY_SEVERAL = (
    ("meetings between ranks", "us"),
    ("reading peers over NVLink", "GB/s"),
    ("multimem, which needs a switch", "us"),
    ("overlap with a product", "%"),
)


@dataclass
class Results:
    """Rows of the CSV; what was not measured is a row too."""

    budget: float
    dry: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def add(self, case: str, what: str, value: object, unit: str, note: str = "") -> None:
        self.rows.append({"case": case, "what": what, "value": value, "unit": unit, "note": note})
        print(f"{case:<24}{what:<34}{value!s:>12} {unit:<6}{note}", flush=True)

    def attempt(self, case: str, what: str, unit: str, call: Callable[[], float]) -> float | None:
        """Measure unless there is a reason not to; the reason is the row's note."""
        spent = time.monotonic() - self.start > self.budget
        if self.dry or spent:
            reason = "dry run" if self.dry else "the budget was spent"
            self.add(case, what, "", unit, f"not run: {reason}")
            return None
        try:
            value = call()
        except Exception as error:
            self.add(case, what, "", unit, f"not run: {type(error).__name__}: {str(error)[:120]}")
            return None
        self.add(case, what, round(value, 3), unit)
        return value

    def write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["case", "what", "value", "unit", "note"])
            writer.writeheader()
            writer.writerows(self.rows)


def median_us(call: Callable[[], Any]) -> float:
    """Microseconds of one call, by events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def group_of_one() -> str:
    """A process group with this process alone, its symmetric buffer large enough for every case."""
    import torch.distributed as dist

    from llm42c.codegen.triton import symmetric

    folder = tempfile.mkdtemp()
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
    name: str = dist.group.WORLD.group_name
    symmetric.enable(name, max(ROWS) * max(SIZES) * 2, torch.device("cuda", 0))
    return name


def fused(results: Results) -> None:
    """Each form against the norm alone; rows whose bits differ (0 is right)."""
    from llm42c.codegen.ops import registry

    registry.define()
    ops: Any = torch.ops.llm42
    name = None if results.dry else group_of_one()
    for size in SIZES:
        for rows in ROWS:
            case = f"{rows} x {size}"
            if results.dry:
                inputs: tuple[Any, ...] = ()
            else:
                inputs = (randn(rows, size), randn(rows, size), randn(size), EPS, 0.0, True)
            alone = results.attempt(
                case, "add_rms_norm alone", "us", lambda i=inputs: median_us(lambda: ops.add_rms_norm(*i))
            )
            for what, call in forms(inputs, name):
                took = results.attempt(case, what, "us", lambda c=call: median_us(c))
                if alone and took:
                    results.add(case, what, round(took / alone, 3), "x norm")
            results.attempt(case, "rows that differ", "rows", lambda i=inputs: differing(i, name))


def forms(inputs: tuple[Any, ...], name: str | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Both kernels by name, whatever the operator would choose."""
    from llm42c.codegen.triton import symmetric

    def launch(form: Any) -> Any:
        x, residual, weight, eps, offset, cast_first = inputs
        space = symmetric._workspaces[name or ""]
        return symmetric._launch(space, form, x, residual, weight, eps, offset, cast_first)

    for form in ("one", "two", "shard"):
        yield f"fused, {form}", lambda f=form: launch(f)


def differing(inputs: tuple[Any, ...], name: str | None) -> float:
    want = torch.ops.llm42.add_rms_norm(*inputs)[0].view(torch.int16)
    wrong = 0
    for _, call in forms(inputs, name):
        wrong += int((call()[0].view(torch.int16) != want).any(1).sum())
    return float(wrong)


def products(results: Results) -> None:
    """Two products over parts of the tokens against one over all of them."""
    sms = 132 if results.dry else torch.cuda.get_device_properties(0).multi_processor_count
    for name, k, n in PRODUCTS:
        weight = None if results.dry else randn(n, k)
        for tokens in TOKENS:
            case, x = f"{name} {tokens}", None if results.dry else randn(tokens, k)
            whole = results.attempt(case, "whole", "us", lambda x=x, w=weight: median_us(lambda: x @ w.T))
            for first in splits(tokens, n, sms):
                took = results.attempt(
                    case, f"split {first} + {tokens - first}", "us",
                    lambda x=x, w=weight, f=first: median_us(lambda: (x[:f] @ w.T, x[f:] @ w.T)),
                )  # fmt: skip
                if whole and took:
                    results.add(case, f"split {first} + {tokens - first}", round(took / whole, 3), "x whole")


def splits(tokens: int, n: int, sms: int, tile: int = 128) -> list[int]:
    """Half; half plus one and two tiles; and the largest part up to half that fills whole waves of tiles."""
    half = tokens // 2
    columns = -(-n // tile)
    full = [m for m in range(tile, half + 1, tile) if (m // tile * columns) % sms == 0]
    found = {half, half + tile, half + 2 * tile, *(full[-1:])}
    return sorted(m for m in found if 0 < m < tokens)


def kernels(results: Results) -> None:
    """What every kernel of eight ranks asks of the device, compiled for it ahead of time."""
    from llm42c.codegen.triton import devices
    from llm42c.codegen.triton.catalog import kernels as catalog

    target = devices.from_table("NVIDIA H200") if results.dry else devices.detect()
    for kernel in catalog(target):
        if not kernel.label.startswith(("all_reduce_norm", "multimem")):
            continue
        if results.dry:
            results.add("kernels", kernel.label, len(kernel.source.splitlines()), "lines", "emitted only")
            continue
        results.attempt(
            "kernels", kernel.label, "regs", lambda k=kernel: float(k.compile(target).resources.registers)
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("fused_norm.csv"))
    parser.add_argument("--budget", type=float, default=300.0)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        print("no GPU here: nothing was measured and no file was written (--dry-run lists the cases)")
        return 1
    results = Results(options.budget, options.dry_run)
    for step in (kernels, fused, products):
        try:
            step(results)
        except Exception as error:
            results.add(step.__name__, "stopped", "", "", f"{type(error).__name__}: {str(error)[:200]}")
            if options.dry_run:
                return 1
    for what, unit in ONLY_SEVERAL:
        results.add("several GPUs", what, "", unit, "not run: needs two or more")
    if options.dry_run:
        return 0
    results.write(options.out)
    # The communicator of one process has nobody to say goodbye to, and may wait for it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
