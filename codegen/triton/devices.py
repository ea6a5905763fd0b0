"""What is known of a GPU: from its driver, and from a reviewed table of what no driver tells."""

from __future__ import annotations

import fnmatch
import functools
from dataclasses import dataclass
from typing import Any

import torch

from llm42c.codegen.device import MEASURED, Device, UnknownDeviceError, Value


@dataclass(frozen=True)
class Entry:
    """One reviewed row. ``pattern`` is an exact driver name, or has ``*`` where vendors add words."""

    pattern: str
    kind: str
    arch: str
    sms: int
    memory_bandwidth: float
    bf16_flops: float
    link_bandwidth: float | None = None
    l2_bytes: float | None = None
    shared_bytes: float | None = None


_SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}

# Dense rates (vendors print the sparse ones first) and one direction of a link (they print the sum of
# both). First match wins, so exact names stand above patterns.
TABLE: tuple[Entry, ...] = (
    Entry("NVIDIA A100-SXM4-40GB", "cuda", "sm_80", 108, 1555e9, 312e12, 300e9, 40 << 20),
    Entry("NVIDIA A100-SXM4-80GB", "cuda", "sm_80", 108, 2039e9, 312e12, 300e9, 40 << 20),
    Entry("NVIDIA A100-PCIE-40GB", "cuda", "sm_80", 108, 1555e9, 312e12, 32e9, 40 << 20),
    Entry("NVIDIA A100 80GB PCIe", "cuda", "sm_80", 108, 1935e9, 312e12, 32e9, 40 << 20),
    Entry("NVIDIA H100 80GB HBM3", "cuda", "sm_90", 132, 3350e9, 989e12, 450e9, 50 << 20),
    Entry("NVIDIA H100 PCIe", "cuda", "sm_90", 114, 2039e9, 756e12, 64e9, 50 << 20),
    Entry("NVIDIA H100 NVL", "cuda", "sm_90", 132, 3938e9, 835e12, 300e9, 50 << 20),
    Entry("NVIDIA H200", "cuda", "sm_90", 132, 4800e9, 989e12, 450e9, 50 << 20),
    Entry("NVIDIA H200*", "cuda", "sm_90", 132, 4800e9, 989e12, 450e9, 50 << 20),
    Entry("NVIDIA B200*", "cuda", "sm_100", 148, 8000e9, 2250e12, 900e9),
    Entry("NVIDIA L4", "cuda", "sm_89", 58, 300e9, 121e12, 32e9, 48 << 20),
    Entry("NVIDIA L40S", "cuda", "sm_89", 142, 864e9, 362e12, 32e9),
    Entry("NVIDIA A10", "cuda", "sm_86", 72, 600e9, 125e12, 32e9, 6 << 20),
    Entry("NVIDIA GeForce RTX 4090", "cuda", "sm_89", 128, 1008e9, 165e12, 32e9, 72 << 20),
    Entry("AMD Instinct MI300X*", "hip", "gfx942", 304, 5300e9, 1307e12, 448e9, 4 << 20, 64 << 10),
)


def lookup(name: str) -> Entry | None:
    """The row of the table for a driver's device name: an exact name first, then patterns."""
    exact = [e for e in TABLE if e.pattern == name]
    return next(iter(exact + [e for e in TABLE if fnmatch.fnmatchcase(name, e.pattern)]), None)


def from_table(name: str) -> Device:
    """A device that is not here. Raises UnknownDeviceError if the table does not have it."""
    entry = lookup(name)
    if entry is None:
        raise UnknownDeviceError(
            f"no device called {name!r}; the table has {', '.join(e.pattern for e in TABLE)}"
        )
    values = {"warp_size": Value(32 if entry.kind == "cuda" else 64, "architecture")}
    return Device(entry.kind, name, entry.arch, {**values, **_row(entry)})


def _row(entry: Entry) -> dict[str, Value]:
    source = f"table: {entry.pattern}"
    shared = entry.shared_bytes or _SHARED.get(entry.arch)
    numbers = {
        "sms": entry.sms,
        "memory_bandwidth": entry.memory_bandwidth,
        "bf16_flops": entry.bf16_flops,
        "link_bandwidth": entry.link_bandwidth,
        "l2_bytes": entry.l2_bytes,
        "shared_bytes": shared,
    }
    return {n: Value(float(v), source) for n, v in numbers.items() if v is not None}


def detect(index: int = 0) -> Device:
    """A GPU of this machine, from its driver (also ROCm's), completed from the table.

    Raises UnknownDeviceError if there is none, or if the driver contradicts the table about the architecture.
    """
    if not torch.cuda.is_available():
        raise UnknownDeviceError("no cuda device on this machine")
    p: Any = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    arch = p.gcnArchName.split(":")[0] if hip else f"sm_{p.major}{p.minor}"
    fields = {
        "sms": "multi_processor_count",
        "warp_size": "warp_size",
        "shared_bytes": "shared_memory_per_block_optin",
        "shared_bytes_per_sm": "shared_memory_per_multiprocessor",
        "registers_per_sm": "regs_per_multiprocessor",
        "l2_bytes": "L2_cache_size",
        "memory_bytes": "total_memory",
    }
    found = {
        ours: Value(float(getattr(p, theirs)), f"driver: {theirs}")
        for ours, theirs in fields.items()
        if getattr(p, theirs, 0)
    }
    entry = lookup(p.name)
    if entry is not None and entry.arch != arch:
        raise UnknownDeviceError(f"the driver calls {p.name} {arch}, the table {entry.arch}")
    return Device("hip" if hip else "cuda", p.name, arch, found).with_values(_row(entry) if entry else {})


def rates() -> dict[str, Value]:
    """Of memory, by copies of a large buffer, which count reads and writes; the best of seven."""
    out_of = torch.ones(1 << 28, device="cuda")  # 1 GiB, more than any L2
    into = torch.empty_like(out_of)
    best = float("inf")
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        into.copy_(out_of)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e-3)
    return {"memory_bandwidth": Value(2 * out_of.nbytes / best, f"{MEASURED}: copy of 1 GiB")}


@functools.cache
def _device(index: int) -> Device:
    try:
        return detect(index)
    except UnknownDeviceError:
        return Device("cuda", "interpreter", "sm_80")


def device_of(device: torch.device) -> Device:
    """What is known of the GPU that a tensor lies on; a generic one when kernels are interpreted."""
    return _device(device.index or 0)
