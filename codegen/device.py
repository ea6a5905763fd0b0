"""What the compiler knows of a device: every value with where it came from.

A target (``targets.py``) says what its devices are, and measures them: what the driver or the operating
system tells, a measurement made once and cached (:func:`measure`), and what neither tells, from a table of
the target's. JSON goes in and out, so a kernel can be emitted for a device that is not here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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
    "fp16_flops": "FLOP/s",
    "fp8_flops": "FLOP/s",
    "int8_flops": "FLOP/s",
    "fp32_flops": "FLOP/s",
    "tile_m": "rows",  # of a matrix product's result that one unit computes at a time
    "tile_n": "columns",
    "call_seconds": "s",  # what a call costs beside its work
    "link_bandwidth": "B/s",  # one direction
    "link_latency": "s",  # of a collective
    "link_processor_share": "1",  # of the processor, that a collective under way takes from computing
    "cores": "1",
    "tdp_watts": "W",  # what it may draw
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
    """A device. ``kind`` is the target's word for what makes its devices differ: "cpu", "cuda", "hip".
    ``arch`` is the name compilers use: ``sm_90``, ``gfx942``, ``x86_64``."""

    kind: str
    name: str
    arch: str
    values: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
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


def lines(path: str | Path) -> list[str]:
    """Of a file; none where it cannot be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def cache_file(device: Device) -> Path:
    """Where measurements of this device are kept."""
    return cache.folder() / "targets" / f"{device.hash[:16]}.json"


def measure(device: Device, rates: Callable[[], dict[str, Value]], path: Path | None = None) -> Device:
    """``device`` with ``rates`` as measured here: once, then from the cache file."""
    path = path or cache_file(device)
    if known := _measured(path, device):
        return device.measured(known)
    measured = device.measured(rates())
    _kept[path] = measured
    cache.write(path, measured.to_json())
    return measured


_kept: dict[Path, Device] = {}  # what this process has measured: its file need not be there


def _measured(path: Path, device: Device) -> dict[str, Value]:
    """What was measured of ``device`` before; nothing where the file is not there, or is not whole."""
    try:
        known = Device.from_json("\n".join(lines(path)))
    except (UnknownDeviceError, ValueError, KeyError, TypeError):
        if path not in _kept:
            return {}
        known = _kept[path]
    if known.hash != device.hash:
        return {}
    return {n: v for n, v in known.values.items() if v.source.startswith(MEASURED)}
