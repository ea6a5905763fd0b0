"""NVIDIA and AMD GPUs: Triton kernels, emitted and compiled at the first call of a specialisation."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from llm42c.codegen.device import Device, Value
from llm42c.codegen.implementation import digest_of
from llm42c.codegen.operator import Operator
from llm42c.codegen.targets import Target, TargetUnavailableError
from llm42c.codegen.triton import devices
from llm42c.codegen.triton.packing import Panels

_HERE = Path(__file__).parent
_DRIVER = Path("/proc/driver/nvidia/version")


class GpuTarget(Target):
    """Importing it imports neither an emitter nor Triton."""

    name = "cuda"
    device_type = "cuda"  # ROCm too
    dispatch_key = "CUDA"
    packing = Panels()

    def require(self, device: torch.device) -> None:
        if importlib.util.find_spec("triton") is None:
            raise TargetUnavailableError(
                f"operators on {device} are Triton kernels, and Triton is not installed: pip install triton"
            )
        if torch.cuda.is_available() and (current := torch.cuda.current_device()) != (device.index or 0):
            raise TargetUnavailableError(
                f"the model is on {device}, and torch's current GPU is {current}: set_device first"
            )

    def launcher(self, op: Operator) -> Callable[..., Any]:
        """Calls the function that says ``@implements(…, "cuda")``; the first call imports the emitters."""
        if self.name in op.implementations:
            return op.implementations[self.name]

        def launch(*args: Any, **kwargs: Any) -> Any:
            found = super(GpuTarget, self).launcher(op)
            if found is None:
                raise NotImplementedError(f"{op.qualname} has no implementation for GPUs")
            return found(*args, **kwargs)

        return launch

    def sources(self) -> dict[str, str]:
        return {"emitters": emitters_digest()}

    def identity(self, device: torch.device, foreign: bool, threads: bool) -> dict[str, str]:
        """What the bits of any kernel hang on there: GPU, driver, CUDA, Triton, torch, and their device."""
        import triton

        mine = self.detect(device.index or 0)
        found = {
            "gpu": f"{mine.name} {mine.arch}",
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "triton": triton.__version__,
            "torch": torch.__version__,
            "driver": driver_version(),
            "target": mine.hash,
        }
        return {name: value for name, value in found.items() if value}

    def detect(self, index: int = 0) -> Device:
        return devices.detect(index)

    def rates(self) -> dict[str, Value]:
        return devices.rates()

    def step(self) -> AbstractContextManager[None]:
        """Attention calls inside share the work list and the counters."""
        from llm42c.codegen.triton import attention

        return attention.step()


@functools.cache
def emitters_digest() -> str:
    """Of the sources that GPU kernels are emitted by."""
    return digest_of(_HERE.rglob("*.py"))


def driver_version(path: Path = _DRIVER) -> str:
    """Of the NVIDIA driver: as its kernel module says, else the CUDA version that it serves."""
    with contextlib.suppress(OSError):
        if found := re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", path.read_text()):
            return found[1]
    served = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "" if served is None else f"CUDA {served()}"


TARGET = GpuTarget()
