"""The device that a model lies on: whether it is there, what computes on it, and what its bits depend on."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm42c.codegen import target as targets
from llm42c.codegen.ops import registry
from llm42c.errors import DeviceError

CPU = torch.device("cpu")
_DRIVER = Path("/proc/driver/nvidia/version")


def parse_device(name: str) -> torch.device:
    """``cpu``, or ``cuda``: torch's current GPU. Raises DeviceError for others, and where there is none."""
    if name == "cpu":
        return CPU
    if name != "cuda":
        raise DeviceError(f"device must be cpu or cuda, not {name!r}; CUDA_VISIBLE_DEVICES chooses a GPU")
    if not torch.cuda.is_available():
        why = "" if torch.version.cuda or torch.version.hip else f": torch {torch.__version__} is for CPUs"
        raise DeviceError(f"device cuda was asked for, and there is no GPU that torch can use{why}")
    device = torch.device("cuda", torch.cuda.current_device())
    require_operators(device)
    return device


def require_operators(device: torch.device) -> None:
    """Raises DeviceError unless the operators can run on ``device``."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise DeviceError(f"there are operators for the CPU and for CUDA or ROCm GPUs, none for {device}")
    if importlib.util.find_spec("triton") is None:
        raise DeviceError(
            f"operators on {device} are Triton kernels, and Triton is not installed: pip install triton"
        )
    if torch.cuda.is_available() and (current := torch.cuda.current_device()) != (device.index or 0):
        raise DeviceError(f"the model is on {device}, and torch's current GPU is {current}: set_device first")


def load_operators(device: torch.device) -> None:
    """Make the operators callable on ``device``. Raises DeviceError, or BuildError (no C++ compiler)."""
    require_operators(device)
    if device.type == "cpu":
        registry.load()
    else:
        registry.define()


def has_implementation(operator: str, device: torch.device) -> bool:
    """Whether ``llm42::<operator>`` has an implementation on ``device``."""
    return registry.is_computed_on(operator, "cuda" if device.type == "cuda" else "cpu")


def device_of_inputs(inputs: Iterable[object]) -> torch.device:
    """Where a graph with these inputs runs: on the accelerator if any lies there."""
    return next((x.device for x in inputs if isinstance(x, Tensor) and x.device.type != "cpu"), CPU)


def device_of_model(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), CPU)


def attention_step(device: torch.device) -> AbstractContextManager[None]:
    """Attention calls inside share what is made once a step for all layers: the work list, the counters."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    from llm42c.codegen.triton import attention

    return attention.step()


def in_steps(call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``call``, each time in an :func:`attention_step` of its own."""
    if device.type == "cpu":
        return call

    def step(*args: Any) -> Any:
        with attention_step(device):
            return call(*args)

    return step


def gpu_identity(device: torch.device) -> dict[str, str]:
    """What the bits of any kernel hang on there: GPU, driver, CUDA, Triton, torch, and their target."""
    import triton

    target = targets.detect("cuda", device.index or 0)
    found = {
        "gpu": f"{target.name} {target.arch}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "driver": driver_version(),
        "target": target.hash,
    }
    return {name: value for name, value in found.items() if value}


def driver_version(path: Path = _DRIVER) -> str:
    """Of the NVIDIA driver: as its kernel module says, else the CUDA version that it serves."""
    with contextlib.suppress(OSError):
        if found := re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", path.read_text()):
            return found[1]
    served = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "" if served is None else f"CUDA {served()}"
