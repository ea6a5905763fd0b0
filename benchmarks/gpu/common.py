"""What the scripts of this folder share: rows of results, and the time of a call."""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COLUMNS = ("case", "what", "value", "unit", "note")


class Results:
    """Rows of the CSV, printed as they come; what could not be measured is a row with the reason.

    With ``dry`` everything runs once on the CPU and numbers mean nothing.
    """

    def __init__(self, budget: float, dry: bool = False) -> None:
        self.rows: list[dict[str, Any]] = []
        self.dry = dry
        self.device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
        self._end = time.monotonic() + budget

    @property
    def spent(self) -> bool:
        return time.monotonic() > self._end

    def add(self, case: str, what: str, value: object, unit: str, note: str = "") -> None:
        value = float(f"{value:.5g}") if isinstance(value, float) else value
        self.rows.append(dict(zip(COLUMNS, (case, what, value, unit, note), strict=True)))
        print(f"{case:<28}{what:<40}{value!s:>12} {unit:<9}{note}", flush=True)

    def not_run(self, case: str, what: str, unit: str, reason: object) -> None:
        text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
        self.add(case, what, "", unit, f"not run: {' '.join(text.split())[:200]}")

    def attempt(self, case: str, what: str, unit: str, call: Callable[[], Any]) -> Any:
        """The value of ``call`` as a row; None, and a row with the reason, if there is none."""
        if self.spent:
            self.not_run(case, what, unit, "the budget was spent")
            return None
        try:
            value = call()
        except Exception as error:
            self.not_run(case, what, unit, error)
            return None
        self.add(case, what, value, unit)
        return value

    def free(self) -> None:
        """Give back what the last case held."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def median_ms(self, call: Callable[[], Any], times: int = 20) -> float:
        """Milliseconds of one call: the median of ``times`` after 3, by events."""
        if self.dry:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        for _ in range(3):
            call()
        found = []
        for _ in range(times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        return statistics.median(found)

    def write(self, path: Path | None) -> None:
        """The CSV, if it is wanted."""
        if path is None:
            return
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)


def options_of(description: str | None, default: Path) -> argparse.ArgumentParser:
    """The options that all scripts have; see :func:`gpu_or_dry`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help=f"default: {default.name} beside the script")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds")
    parser.add_argument("--dry-run", action="store_true", help="run the code once on the CPU, at a tiny size")
    return parser


def gpu_or_dry(options: argparse.Namespace, default: Path) -> bool:
    """Whether there is anything to run on; says so if not.

    ``--out`` becomes ``default``, but a dry run writes only where it is told to.
    """
    if torch.cuda.is_available() or options.dry_run:
        options.out = options.out or (None if options.dry_run else default)
        return True
    print("no GPU here: nothing was measured and no file was written (--dry-run runs the code)")
    return False


def machine(results: Results) -> None:
    """Rows that say what was measured on what."""
    import triton

    from llm42c.codegen.triton.target import driver_version

    name = "CPU, dry run" if results.dry else torch.cuda.get_device_name(results.device)
    results.add("machine", "gpu", name, "")
    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "triton": triton.__version__,
        "driver": driver_version() or "unknown",
    }
    for what, version in found.items():
        results.add("machine", what, version, "")
