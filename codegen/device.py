"""What the compiler knows of a device: every value with where it came from.

Three sources, in the order in which they win: the driver or the operating system (:func:`detect`), a
measurement made once and cached (:func:`measure`), and a small reviewed table (:data:`TABLE`) of what no
driver tells, such as memory bandwidth and dense matrix rates. JSON goes in and out, so a kernel can be
emitted for a device that is not here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm42c.codegen import cache

MEASURED = "measured"
MEASURABLE = frozenset(
    {
        "memory_bandwidth",
        "bandwidth_per_core",
        "fp32_flops",
        "call_seconds",
        "link_bandwidth",
        "link_latency",
        "link_processor_share",
    }
)
UNITS = {
    "sms": "1",
    "warp_size": "lanes",
    "shared_bytes": "B",  # that one block may ask for
    "shared_bytes_per_sm": "B",
    "registers_per_sm": "1",
    "l2_bytes": "B",
    "memory_bytes": "B",
    "memory_bandwidth": "B/s",
    "bandwidth_per_core": "B/s",
    "bf16_flops": "FLOP/s",  # dense, fp32 accumulation
    "fp32_flops": "FLOP/s",
    "tile_m": "rows",  # of a matrix product's result that one unit computes at a time
    "tile_n": "columns",
    "call_seconds": "s",  # what a call costs beside its work
    "link_bandwidth": "B/s",  # one direction
    "link_latency": "s",  # of a collective
    "link_processor_share": "1",  # of the processor, that a collective under way takes from computing
    "cores": "1",
}


class UnknownDeviceError(ValueError):
    """A device that cannot be read, found or completed."""


@dataclass(frozen=True)
class Value:
    """A number in the unit of its name (:data:`UNITS`), and who says so."""

    value: float
    source: str


@dataclass(frozen=True)
class Device:
    """A device. ``arch`` is the name compilers use: ``sm_90``, ``gfx942``, ``x86_64``."""

    kind: str  # "cuda", "hip" or "cpu"
    name: str
    arch: str
    values: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("cuda", "hip", "cpu"):
            raise UnknownDeviceError(f"kind must be cuda, hip or cpu, not {self.kind!r}")
        if unknown := self.values.keys() - UNITS.keys():
            raise UnknownDeviceError(f"unknown values {sorted(unknown)}; known are {sorted(UNITS)}")
        for name, value in self.values.items():
            if not (value.value > 0 and value.value < float("inf")):
                raise UnknownDeviceError(f"{name} must be positive and finite, not {value.value}")

    def get(self, name: str, default: float | None = None) -> float:
        """The number called ``name``; raises UnknownDeviceError if it is not known and has no default."""
        if name in self.values:
            return self.values[name].value
        if default is None:
            raise UnknownDeviceError(f"{self.name}: {name} is not known")
        return default

    def count(self, name: str, default: int | None = None) -> int:
        return int(self.get(name, default))

    @property
    def capability(self) -> int:
        """90 of ``sm_90``; 0 elsewhere."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0

    def with_values(self, values: dict[str, Value]) -> Device:
        """Itself, with ``values`` added where nothing was known yet."""
        return dataclasses.replace(self, values={**values, **self.values})

    def measured(self, values: dict[str, Value]) -> Device:
        """Itself, with measurements in place of what the table says."""
        return dataclasses.replace(self, values={**self.values, **values})

    def to_json(self) -> str:
        """Canonical JSON: sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=2)

    @staticmethod
    def from_json(text: str) -> Device:
        """The inverse of :meth:`to_json`. Raises UnknownDeviceError."""
        try:
            raw = json.loads(text)
            values = {n: Value(float(v["value"]), str(v["source"])) for n, v in raw["values"].items()}
            return Device(raw["kind"], raw["name"], raw["arch"], values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UnknownDeviceError(f"not the JSON of a device: {error}") from error

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of all but rates: those may be measured, and choose schedules, never bits."""
        fixed = {n: float(v.value) for n, v in self.values.items() if n not in MEASURABLE}
        identity = [self.kind, self.name, self.arch, fixed]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


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


def detect(device: str = "cpu", index: int = 0) -> Device:
    """The device of this machine, from driver or operating system, completed from the table.

    ``device`` is ``"cpu"`` or ``"cuda"`` (also for ROCm). Raises UnknownDeviceError if there is none,
    or if the driver contradicts the table about the architecture.
    """
    if device == "cpu":
        return _detect_cpu()
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        raise UnknownDeviceError(f"no {device} device on this machine")
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


def _detect_cpu() -> Device:
    import platform

    name = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values = {"cores": Value(float(cores), "OS: affinity")}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size = _lines(index / "level"), _lines(index / "size")
        if level == ["2"] and size and size[0].endswith("K"):
            values["l2_bytes"] = Value(float(size[0][:-1]) * 1024, f"OS: {index}/size")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            values["memory_bytes"] = Value(float(line.split()[1]) * 1024, "OS: /proc/meminfo")
    return Device("cpu", name, platform.machine(), values)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def cache_file(device: Device) -> Path:
    """Where measurements of this device are kept."""
    return cache.folder() / "targets" / f"{device.hash[:16]}.json"


def measure(device: Device, kind: str, *, again: bool = False, path: Path | None = None) -> Device:
    """``device`` with its memory bandwidth as measured here: once, then from the cache file.

    A copy of a large buffer counts its reads and its writes; the best of seven is taken. On a CPU one
    core alone is measured too, which tells how many cores fill the memory.
    """
    path = path or cache_file(device)
    if not again and (known := _measured(path, device)):
        return device.measured(known)
    values = _measure_cpu() if kind == "cpu" else _measure_gpu(kind)
    measured = device.measured(values)
    _kept[path] = measured
    cache.write(path, measured.to_json())
    return measured


_kept: dict[Path, Device] = {}  # what this process has measured: its file need not be there


def _measured(path: Path, device: Device) -> dict[str, Value]:
    """What was measured of ``device`` before; nothing where the file is not there, or is not whole."""
    try:
        known = Device.from_json("\n".join(_lines(path)))
    except (UnknownDeviceError, ValueError, KeyError, TypeError):
        if path not in _kept:
            return {}
        known = _kept[path]
    if known.hash != device.hash:
        return {}
    return {n: v for n, v in known.values.items() if v.source.startswith(MEASURED)}


def decode_workers(device: Device) -> int:
    """How many cores fill a CPU's memory: its bandwidth over that of one core, rounded down, at least 1.

    Raises UnknownDeviceError if the bandwidths are not known (:func:`measure`).
    """
    return max(1, int(device.get("memory_bandwidth") / device.get("bandwidth_per_core")))


def local_decode_workers() -> int:
    """:func:`decode_workers` of this machine, measured once."""
    return decode_workers(measure(detect("cpu"), "cpu"))


def _measure_cpu() -> dict[str, Value]:
    import time

    import torch

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


def _measure_gpu(device: str) -> dict[str, Value]:
    import torch

    out_of = torch.ones(1 << 28, device=device)  # 1 GiB, more than any L2
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
