"""How long a step takes, from three coefficients that were fitted to measurements of a named engine::

    seconds = constant + memory_share · bytes / bandwidth + compute_share · operations / rate

Bytes are those of weights and of the keys and values that a step reads, operations those of its products; a
device gives bandwidth and rate. A sum, because a step overlaps the two badly. The interval is that of what
the fit got wrong about models that it had not seen. A device is not predicted by another kind's calibration.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm42c.codegen import cache
from llm42c.codegen.device import Device

_FOLDER = "plans"


@dataclass(frozen=True)
class Calibration:
    """``low`` and ``high``: measured over predicted seconds, of 90 % of what was held out. ``rate``:
    operations a second that ``compute_share`` is of, where the device's own is not known. ``power``: what
    is drawn, of the TDP: least, median, most. ``base_bytes``: what a process takes beside weights, keys
    and values."""

    name: str
    source: str
    devices: tuple[str, ...]  # names or architectures
    constant: float
    memory_share: float
    compute_share: float
    low: float
    high: float
    prefill: bool = False
    rate: float | None = None
    power: tuple[float, float, float] | None = None
    base_bytes: tuple[float, float] | None = None
    weights: tuple[float, float] = (0.0, float("inf"))  # bytes of the models that it was fitted to
    dtype: str = "bfloat16"
    formats: tuple[str, ...] = ()  # of quantised weights


_MLENERGY = "ML.ENERGY Leaderboard 3.0 (2025-12-01), vLLM 0.11.1, bf16, dense models"
PACKAGED: tuple[Calibration, ...] = (
    Calibration(
        "vllm-h100",
        f"{_MLENERGY}: 80 configurations on H100",
        ("NVIDIA H100 SXM", "NVIDIA H100 80GB HBM3"),
        1.666e-3,
        1.2687,
        2.7711,
        0.836,
        1.164,
        power=(0.58, 0.79, 0.99),
        weights=(16e9, 142e9),
    ),
    Calibration(
        "vllm-b200",
        f"{_MLENERGY}: 80 configurations on B200",
        ("NVIDIA B200",),
        2.174e-3,
        1.6495,
        2.2141,
        0.823,
        2.07,
        power=(0.45, 0.87, 0.98),
        weights=(16e9, 812e9),
    ),
)


@dataclass(frozen=True)
class Observation:
    """A step that was timed: what it read and computed, and its seconds."""

    nbytes: float
    operations: float
    seconds: float


def fit(observations: Sequence[Observation], bandwidth: float, rate: float) -> tuple[float, float, float]:
    """(constant, memory_share, compute_share), none negative, with the least relative squares."""
    seconds = np.array([o.seconds for o in observations])
    columns = np.array([[1.0, o.nbytes / bandwidth, o.operations / rate] for o in observations])
    weighted, ones = columns / seconds[:, None], np.ones(len(seconds))
    best, least = np.zeros(3), float("inf")
    for count in (1, 2, 3):
        for chosen in itertools.combinations(range(3), count):
            x, *_ = np.linalg.lstsq(weighted[:, chosen], ones, rcond=None)
            error = float(((weighted[:, chosen] @ x - ones) ** 2).sum())
            if (x >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(3), error
                best[list(chosen)] = x
    return float(best[0]), float(best[1]), float(best[2])


def of(device: Device, dtype: str, formats: Sequence[str] = ()) -> Calibration | None:
    """For models of that dtype and those formats: what was measured of the device here, else what is packaged
    for its name."""
    kept = _read(place(device, dtype, formats))
    if kept is not None:
        return kept
    wanted = dtype, tuple(sorted(formats))
    return next((c for c in PACKAGED if device.name in c.devices and (c.dtype, c.formats) == wanted), None)


def place(device: Device, dtype: str, formats: Sequence[str]) -> Path:
    """Where the calibration of a device is kept."""
    return cache.folder() / _FOLDER / f"speed-{device.hash[:16]}-{'-'.join([dtype, *sorted(formats)])}.json"


def keep(device: Device, calibration: Calibration) -> bool:
    """Whether it could be kept."""
    path = place(device, calibration.dtype, calibration.formats)
    return cache.place(_FOLDER) is not None and cache.write(path, json.dumps(asdict(calibration), indent=1))


def _read(path: Path) -> Calibration | None:
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return Calibration(**fields)
    except (OSError, ValueError, TypeError):
        return None
