"""A plan as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from llm42c.codegen.device import MEASURED, UNITS, Device
from llm42c.runtime.plan.cost import Cost
from llm42c.runtime.plan.labels import FEATURES
from llm42c.runtime.plan.plan import Plan
from llm42c.runtime.plan.speed import Interval
from llm42c.runtime.plan.units import shown

_KINDS = {"B/s": "rate", "FLOP/s": "operations", "B": "bytes", "W": "power"}


def lines(plan: Plan) -> Iterator[str]:
    yield from _device(plan)
    yield from _needs(plan)
    yield from _speed(plan)
    yield from _cost(plan)
    for i, decision in enumerate(plan.decisions):
        yield _row("decides" if i == 0 else "", f"{decision.name} {_decided(decision.value)}: {decision.why}")


def _row(head: str, text: str) -> str:
    return f"{head:<10}{text}"


def value(device: Device, name: str) -> str:
    kind = _KINDS.get(UNITS[name])
    number = device.values[name].value
    return shown(number, kind) if kind is not None else f"{number:g}"  # type: ignore[arg-type]


def _device(plan: Plan) -> Iterator[str]:
    device = plan.target.device
    count = f"{plan.asked.devices} × " if plan.asked.devices > 1 else ""
    arch = "" if device.arch == "unknown" else f", {device.arch}"
    yield _row("device", f"{count}{device.name}{arch} ({plan.target.origin})")
    names = [
        n for n in UNITS if n in device.values and (n in FEATURES or n in ("l2_bytes", "bandwidth_per_core"))
    ]
    for name in names:
        yield f" {name:<19}{value(device, name):<15} {device.values[name].source}"
    for r in plan.target.rejected:
        yield f" {'rejected':<19}line {r.where} {r.shown!r} for {r.field}: {r.reason}"


def _needs(plan: Plan) -> Iterator[str]:
    n = plan.needs
    formats = "".join(f", {count} weights of {name}" for name, count in n.formats.items())
    kv = "exact" if n.kv_exact else "by its configuration"
    yield _row(
        "needs",
        f"{n.family}, {n.dtype}{formats}: weights {n.weights:,} B exact · KV {n.kv_per_token:,} B "
        f"a token {kv}",
    )
    base = plan.calibration.base_bytes if plan.calibration is not None else None
    kv_bytes = next((int(d.value) for d in plan.decisions if d.name == "kv_cache_bytes"), None)
    if base is not None and kv_bytes is not None:
        low, high = (n.weights + kv_bytes + b for b in base)
        yield _row(
            "", f"peak {(low + high) / 2e9:.3g} [{low / 1e9:.3g}-{high / 1e9:.3g}] GB with the KV below"
        )
    else:
        yield _row("", "peak not known: what a process takes besides was not measured on this device")


def _interval(x: Interval, digits: int = 3) -> str:
    return f"{x.value:.{digits}g} [{x.low:.{digits}g}-{x.high:.{digits}g}]"


def _speed(plan: Plan) -> Iterator[str]:
    parts = []
    # A short measurement of memory is no limit: something else may have run beside it.
    measured = plan.target.device.values["memory_bandwidth"].source.startswith(MEASURED)
    for s in plan.speeds:
        if s.tokens_per_second is None:
            bound = "" if measured else f", at most {s.most:,.0f} tok/s"
            parts.append(f"batch {s.batch}: not known{bound}")
        else:
            parts.append(f"batch {s.batch}: {_interval(s.tokens_per_second)} tok/s")
    yield _row("speed", " · ".join(parts))
    first = "not known" if plan.first_token is None else f"{_interval(plan.first_token.map(1e3))} ms"
    source = (
        "no calibration is of this device"
        if plan.calibration is None
        else f"{plan.calibration.name}: {plan.calibration.source}"
    )
    yield _row("", f"TTFT(1k) {first} · {source}")
    c = plan.calibration
    if c is not None and not c.weights[0] <= plan.needs.weights <= c.weights[1]:
        low, high = (size / 1e9 for size in c.weights)
        yield _row("", f"extrapolated: that was fitted to weights of {low:.3g} to {high:.3g} GB")


def _cost(plan: Plan) -> Iterator[str]:
    c: Cost = plan.cost
    batch = plan.speeds[-1].batch
    money = "$ not known" + (": give --usd-per-hour" if plan.asked.usd_per_hour is None else "")
    if c.usd is not None:
        money = f"${_interval(c.usd)}"
    energy = "kWh not known" + (": the TDP is not" if "tdp_watts" not in plan.target.device.values else "")
    if c.kwh is not None:
        energy = f"{_interval(c.kwh)} kWh" + (
            " (power: TDP, a ceiling)" if c.ceiling else " (power as measured, of the TDP)"
        )
    parts = [money, energy]
    where = c.country
    if where is not None:
        grid = (
            "grid not known"
            if where.grid is None
            else f"{where.code} {where.grid.value:.0f} g/kWh, {where.grid.source}"
        )
        parts.append(
            f"{_interval(c.grams)} g CO2 ({grid})" if c.grams is not None else f"CO2 not known ({grid})"
        )
    yield _row("cost", f"a million tokens at batch {batch}: {' · '.join(parts)}")
    if where is not None:
        yield _row("access", _access(c))


def _access(c: Cost) -> str:
    where = c.country
    assert where is not None
    if where.income is None:
        return f"median income of {where.name} not known"
    unit = "PPP dollars" if where.ppp else "market dollars"
    said = f"a month's median income in {where.code}: {where.income.value:.0f} {unit} ({where.income.source})"
    if c.tokens_a_month is not None:
        return f"{said} buys {_interval(c.tokens_a_month.map(1e-6))} million tokens"
    if where.ppp and c.usd is not None:
        return f"{said}; the price is in market dollars, which are not compared with them"
    return said


def _decided(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value
