"""What is known of a CPU, and what is measured of it."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm42c.codegen.device import MEASURED, Device, Value, lines


def detect() -> Device:
    """From the operating system."""
    name = platform.processor() or platform.machine()
    for line in lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values = {"cores": Value(float(cores), "OS: affinity")}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size = lines(index / "level"), lines(index / "size")
        if level == ["2"] and size and size[0].endswith("K"):
            values["l2_bytes"] = Value(float(size[0][:-1]) * 1024, f"OS: {index}/size")
    for line in lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            values["memory_bytes"] = Value(float(line.split()[1]) * 1024, "OS: /proc/meminfo")
    return Device("cpu", name, platform.machine(), values)


def decode_workers(device: Device) -> int:
    """How many cores fill a CPU's memory: its bandwidth over that of one core, rounded down, at least 1.

    Raises UnknownDeviceError if the bandwidths are not known (:func:`rates`).
    """
    return max(1, int(device.get("memory_bandwidth") / device.get("bandwidth_per_core")))


def rates() -> dict[str, Value]:
    """Of memory, by copies of a large buffer, which count reads and writes; the best of seven. One core alone
    tells how many cores fill the memory."""

    def copy_rate() -> float:
        best = float("inf")
        for _ in range(7):
            start = time.perf_counter()
            into.copy_(out_of)
            best = min(best, time.perf_counter() - start)
        return 2 * out_of.nbytes / best

    out_of, into = torch.ones(1 << 24), torch.zeros(1 << 24)  # 64 MiB each
    threads = torch.get_num_threads()
    every = copy_rate()
    try:
        torch.set_num_threads(1)
        one = copy_rate()
    finally:
        torch.set_num_threads(threads)
    source = f"{MEASURED}: copy of 64 MiB"
    return {
        "memory_bandwidth": Value(max(every, one), f"{source}, {threads} threads"),
        "bandwidth_per_core": Value(one, f"{source}, 1 thread"),
    }


def rates_now(dtype: torch.dtype = torch.float32) -> dict[str, Value]:
    """Rates of products, and what a call costs, with the present number of threads.

    How fast a product of few rows gets through its weight is measured as such: no copy tells, and ranks of
    one machine share its memory.
    """
    x, w = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    product = _best(lambda: torch.nn.functional.linear(x, w), 5)
    few, weight = torch.ones(2, 4096, dtype=dtype), torch.ones(4096, 4096, dtype=dtype)
    reading = _median(lambda: torch.nn.functional.linear(few, weight), 9)
    small = torch.ones(4)
    call = _best(lambda: [small + small for _ in range(64)], 5) / 64
    source = f"{MEASURED}: product of [256, 1024] and [1024, 1024], {torch.get_num_threads()} threads"
    return {
        "fp32_flops": Value(2.0 * 256 * 1024 * 1024 / product, source),
        "memory_bandwidth": Value(
            weight.nbytes / reading, f"{MEASURED}: the weight of a product of [2, 4096] and [4096, 4096]"
        ),
        "call_seconds": Value(4 * call, f"{MEASURED}: four additions of 4 elements"),
    }


def _best(run: Callable[[], Any], times: int) -> float:
    return min(_seconds(run, times))


def _median(run: Callable[[], Any], times: int) -> float:
    return statistics.median(_seconds(run, times))


def _seconds(run: Callable[[], Any], times: int) -> list[float]:
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found
