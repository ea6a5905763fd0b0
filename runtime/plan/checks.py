"""Is a value believable: ranges, cross-checks between the text's own numbers, and what is published.

- dense operations = units × operations a unit does a clock × boost clock
- bandwidth = width of the bus × rate of a pin; or channels × 8 bytes × transfers a second
"""

from __future__ import annotations

from dataclasses import dataclass

from llm42c.runtime.plan.known import Known
from llm42c.runtime.plan.units import Kind, shown

RANGES: dict[str, tuple[float, float]] = {
    "memory_bandwidth": (5e9, 60e12),
    "memory_bytes": (256e6, 64e12),
    "bf16_flops": (1e10, 2e16),
    "fp16_flops": (1e10, 2e16),
    "fp8_flops": (1e10, 4e16),
    "int8_flops": (1e10, 4e16),
    "fp32_flops": (1e10, 2e15),
    "link_bandwidth": (1e9, 4e12),
    "tdp_watts": (1.0, 5000.0),
    "sms": (1.0, 2000.0),
    "cores": (1.0, 2048.0),
}
CLOSE = 0.03  # of a published number, which is rounded
CROSS = 0.04  # of a product of printed numbers


@dataclass(frozen=True)
class Verdict:
    """``agrees``: who confirms it; ``against``: who contradicts it; ``factor``: what to divide it by."""

    agrees: str = ""
    against: str = ""
    factor: float = 1.0


def near(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * abs(b)


def in_range(field: str, value: float, kind: Kind) -> str:
    """Why a value is not plausible; empty if it is."""
    low, high = RANGES[field]
    if low <= value <= high:
        return ""
    return f"not plausible: {field} is {shown(low, kind)} to {shown(high, kind)} on any device"


def published(known: Known | None, field: str, value: float, half_step: float, kind: Kind) -> Verdict:
    """What is published of a known device. Capacities may be of 1024."""
    there = () if known is None else known.values.get(field, ())
    if known is None or not there:
        return Verdict()
    for number in there:
        if near(value, number, CLOSE) or abs(value - number) <= half_step:
            return Verdict(agrees=known.source)
        if field == "memory_bytes" and number * 0.93 <= value <= number * 1.08:
            return Verdict(agrees=known.source)
    says = " or ".join(shown(number, kind) for number in there[:3])
    if field.endswith("_flops") and any(near(value, 2 * number, CLOSE) for number in there):
        return Verdict(against=f"twice the dense {says} of the {known.source}", factor=2.0)
    if field == "link_bandwidth" and any(near(value, 2 * number, CLOSE) for number in there):
        return Verdict(against=f"twice the {says} a direction of the {known.source}", factor=2.0)
    return Verdict(against=f"contradicts {says} of the {known.source}")


def by_units(known: Known | None, units: float | None, clock: float | None, value: float) -> Verdict:
    """Dense operations of bfloat16 against units × operations a clock × clock, all but one of the text."""
    if known is None or not known.per_clock or units is None or clock is None:
        return Verdict()
    product = units * known.per_clock * clock
    told = f"{units:g} units × {known.per_clock} × {clock / 1e9:.3g} GHz"
    if near(value, product, CROSS):
        return Verdict(agrees=f"{told} agree")
    if near(value, 2 * product, CROSS):
        return Verdict(against=f"twice {told}", factor=2.0)
    return Verdict(against=f"contradicts {told} = {shown(product, 'operations')}")


@dataclass(frozen=True)
class Product:
    """A bandwidth computed from the text's other numbers."""

    value: float
    told: str
    lines: tuple[int, ...]


def by_bus(product: Product | None, value: float) -> Verdict:
    if product is None:
        return Verdict()
    if near(value, product.value, CROSS):
        return Verdict(agrees=f"{product.told} agree")
    return Verdict(against=f"contradicts {product.told} = {shown(product.value, 'rate')}")
