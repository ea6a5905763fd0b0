"""The device that a model lies on: whether it is there, and what computes on it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llm42c.codegen import targets
from llm42c.codegen.ops import registry
from llm42c.codegen.targets import Target, TargetUnavailableError
from llm42c.errors import DeviceError

CPU = torch.device("cpu")


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
    target_of(device)
    return device


def target_of(device: torch.device) -> Target:
    """Who computes the operators on ``device``. Raises DeviceError if they cannot run there."""
    try:
        target = targets.of(device)
        target.require(device)
    except TargetUnavailableError as error:
        raise DeviceError(str(error)) from None
    return target


def load_operators(device: torch.device) -> Target:
    """Make the operators callable on ``device``. Raises DeviceError, or BuildError (no C++ compiler)."""
    target = target_of(device)
    registry.load(device)
    return target


def prepare_ahead(device: torch.device) -> None:
    """Begin, on a thread, what :func:`load_operators` would wait for; what goes wrong is said there."""

    def work() -> None:
        with contextlib.suppress(Exception):
            targets.of(device).prepare()

    threading.Thread(target=work, name="llm42-kernels", daemon=True).start()


def device_of_inputs(inputs: Iterable[object]) -> torch.device:
    """Where a graph with these inputs runs: on the accelerator if any lies there."""
    return next((x.device for x in inputs if isinstance(x, Tensor) and x.device.type != "cpu"), CPU)


def device_of_model(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), CPU)


def dtype_of_model(model: nn.Module) -> torch.dtype:
    """Of what it computes with: quantised weights are of integers."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def in_steps(call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``call``, each time in a step of its own."""
    target = targets.of(device)

    def step(*args: Any) -> Any:
        with target.step():
            return call(*args)

    return step
