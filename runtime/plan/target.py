"""`--device`: a file of any text, a device as JSON, `auto`, or a known name becomes a device with sources.

Where a text is about a device that the compiler's table knows, what the text does not say is completed from
that table, and says so. Where that device is present, its driver wins.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from llm42c.codegen.device import Device, UnknownDeviceError, Value
from llm42c.errors import DeviceTextError
from llm42c.runtime.plan import probe
from llm42c.runtime.plan.known import FAMILIES, KNOWN, Known, names
from llm42c.runtime.plan.reading import Reading, Rejected, read

LARGEST = 1 << 20  # bytes of a text


@dataclass(frozen=True)
class Target:
    """``device``, where it came from, and what of its text was not taken."""

    device: Device
    origin: str
    rejected: list[Rejected] = field(default_factory=list)
    count: int = 1


def resolve(text: str) -> Target:
    """The device that ``--device`` names. Raises DeviceTextError in one line."""
    path = Path(text).expanduser()
    if text == "auto":
        return Target(probe.present(), "this machine")
    if path.is_file():
        return _of_file(path)
    known = _named(text)
    if known is not None:
        return Target(_of_known(known), f"known: {known.source}")
    everything = [k.name for k in KNOWN]
    near = difflib.get_close_matches(text, everything, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DeviceTextError(f"--device {text!r} is no file, not 'auto', and no known device{hint}")


def _of_file(path: Path) -> Target:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DeviceTextError(f"cannot read {path}: {error.strerror}") from None
    if len(raw) > LARGEST:
        raise DeviceTextError(f"{path.name} is larger than {LARGEST >> 20} MiB: no description of a device")
    content = raw.decode("utf-8-sig", errors="replace")
    if path.suffix == ".json" or content.lstrip().startswith("{"):
        try:
            return Target(Device.from_json(content), path.name)
        except (UnknownDeviceError, ValueError) as error:
            raise DeviceTextError(f"{path.name}: {error}") from None
    return of_reading(read(path.name, content))


def of_reading(reading: Reading) -> Target:
    """The device of a text that was read. Raises DeviceTextError where the bandwidth of memory is not
    known."""
    known = reading.subject
    values = {
        f.field: Value(f.value, _source(reading.name, f.where, f.shown, f.reasons))
        for f in reading.features.values()
    }
    kind = _kind(known, values)
    name = known.name if known is not None else Path(reading.name).stem
    device = Device(kind, name, known.arch if known is not None else "unknown", values)
    if known is not None and known.table:
        device = device.with_values(_table(known.table))
    device = probe.driver_wins(device)
    if "memory_bandwidth" not in device.values:
        raise DeviceTextError(_no_bandwidth(reading))
    return Target(device, reading.name, reading.rejected)


def _no_bandwidth(reading: Reading) -> str:
    why = [r for r in reading.rejected if r.field == "memory_bandwidth"]
    if why:
        return (
            f"{reading.name}: no bandwidth of memory: line {why[0].where.partition(':')[0]} "
            f"{why[0].shown!r} is rejected: {why[0].reason}"
        )
    return (
        f"{reading.name} does not say the bandwidth of memory: add a line such as 'memory bandwidth: "
        f"819 GB/s'"
    )


def _source(name: str, where: str, shown: str, reasons: tuple[str, ...]) -> str:
    told = f"{name}:{where} {shown!r}"
    return f"{told} {'; '.join(reasons)}" if reasons else told


def _kind(known: Known | None, values: dict[str, Value]) -> str:
    if known is not None:
        return {"sm": "cuda", "gf": "hip"}.get(known.arch[:2], "other")
    return "cpu" if "cores" in values and "sms" not in values else "other"


def _named(text: str) -> Known | None:
    """The one known device that ``text`` is the name of."""
    found = [known for start, end, known in names(text) if end - start >= 0.5 * len(text)]
    exact = [
        k for k in (*KNOWN, *FAMILIES) if k.name.lower() == text.lower() or k.table.lower() == text.lower()
    ]
    return next(iter([*exact, *found]), None)


def _of_known(known: Known) -> Device:
    """Its published values, where there is one of each."""
    several = sorted(f for f, v in known.values.items() if len({round(x, -9) for x in v}) > 1)
    if "memory_bandwidth" in several and known in FAMILIES:
        variants = [k.name for k in KNOWN if k.family == known.family]
        raise DeviceTextError(f"{known.name} is several devices: say which of {', '.join(variants)}")
    values = {f: Value(v[0], known.source) for f, v in known.values.items()}
    kind = {"sm": "cuda", "gf": "hip"}.get(known.arch[:2], "other")
    device = Device(kind, known.name, known.arch, values)
    return device.measured(_table(known.table)) if known.table else device


def _table(row: str) -> dict[str, Value]:
    from llm42c.codegen.triton import devices

    return devices.from_table(row.replace("*", "")).values
