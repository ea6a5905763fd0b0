"""The machine that this runs on: what its driver or operating system says, and a short measurement of
memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llm42c.codegen.device import Device, Value, lines
from llm42c.errors import DeviceTextError
from llm42c.runtime.plan import checks
from llm42c.runtime.plan.known import names

_GPUS = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def present() -> Device:
    """The GPU of this machine that torch can use, else its CPU."""
    gpu = _gpu()
    return cpu() if gpu is None else gpu


def cpu() -> Device:
    """The CPU of this machine, with the bandwidth of memory as measured."""
    import torch

    from llm42c.codegen import targets
    from llm42c.codegen.device import measure

    target = targets.of(torch.device("cpu"))
    return _limited(measure(target.detect(), target.rates))


def _gpu() -> Device | None:
    """Torch is not imported where no driver is."""
    if not any(Path(device).exists() for device in _GPUS):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    from llm42c.codegen.triton import devices

    return devices.detect()


def _limited(device: Device) -> Device:
    """A container may use less memory than the machine has."""
    for path in _LIMITS:
        said = lines(path)
        if said and said[0].isdigit() and 0 < int(said[0]) < device.get("memory_bytes", float("inf")):
            return dataclasses.replace(
                device, values={**device.values, "memory_bytes": Value(float(said[0]), f"OS: {path}")}
            )
    return device


def driver_wins(device: Device) -> Device:
    """What the driver says of ``device``, if that is the GPU of this machine; else itself.

    Raises DeviceTextError where a text contradicts the driver.
    """
    gpu = _gpu()
    if gpu is None or not _same(device, gpu):
        return device
    for name, said in gpu.values.items():
        mine = device.values.get(name)
        tolerance = 0.08 if name == "memory_bytes" else 0.02
        if (
            mine is not None
            and said.source.startswith("driver")
            and not checks.near(mine.value, said.value, tolerance)
        ):
            raise DeviceTextError(
                f"{name} is {mine.value:g} by {mine.source}, and {said.value:g} by the driver of "
                f"the {gpu.name} that is here"
            )
    return dataclasses.replace(gpu, values={**device.values, **gpu.values})


def _same(device: Device, gpu: Device) -> bool:
    mine, its = names(device.name), names(gpu.name)
    return bool(mine and its) and mine[0][2].family == its[0][2].family
