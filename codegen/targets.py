"""Targets: where operators run. A folder of ``codegen`` with a module ``target`` is one.

Whatever differs between targets is asked of a :class:`Target`; nothing else asks of which kind a device is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from llm42c.codegen.device import Device, UnknownDeviceError, Value
from llm42c.codegen.operator import Operator
from llm42c.codegen.order import Order
from llm42c.codegen.packing import Packing


class TargetUnavailableError(RuntimeError):
    """A device on which the operators cannot run; the message says what to do."""


class Target:
    """Who computes the operators on the devices of one type, and what the bits hang on there.

    ``name`` stands in orders (``orders={"cpu": …}``) and contracts; ``device_type`` is torch's name of the
    devices; ``dispatch_key`` is torch's key of their implementations; ``packing`` is its layout of weights.
    """

    name: str
    device_type: str
    dispatch_key: str
    packing = Packing()

    def require(self, device: torch.device) -> None:
        """Raises TargetUnavailableError unless the operators can run on ``device``."""

    def prepare(self) -> None:
        """What :meth:`load` may do beforehand, on another thread."""

    def load(self) -> None:
        """Make what computes the operators callable; they are defined already. Idempotent."""

    def launcher(self, op: Operator) -> Callable[..., Any] | None:
        """What to register with torch for an operator; None where :meth:`load` does that itself."""
        return _function(self, op)

    def where(self, op: Operator) -> str | None:
        """The module or library that computes an operator; None if nothing does."""
        function = _function(self, op)
        return function.__module__ if function else None

    def order(self, op: Operator) -> Order:
        """The order of an operator here. Raises KeyError if none is declared."""
        return op.orders[self.name]

    def sources(self) -> dict[str, str]:
        """Digests of the sources that compute the operators, by kind: a part of the contract."""
        raise NotImplementedError

    def identity(self, device: torch.device, foreign: bool, threads: bool) -> dict[str, str]:
        """What the bits of a graph hang on besides its operators' orders.

        ``foreign``: it has calls that are neither operators nor exact; ``threads``: sums among them, whose
        order may follow the number of threads.
        """
        raise NotImplementedError

    def detect(self, index: int = 0) -> Device:
        """What is known of a device of this machine. Raises UnknownDeviceError if there is none."""
        raise UnknownDeviceError(f"the target {self.name} does not say what its devices are")

    def rates(self) -> dict[str, Value]:
        """What is measured of a device once, and kept (``device.measure``)."""
        return {}

    def rates_now(self) -> dict[str, Value]:
        """What hangs on this process, such as its threads: measured whenever it is asked for."""
        return {}

    def step(self) -> AbstractContextManager[None]:
        """The calls of this thread inside are those of one step: they share what is made once for all
        layers, and the schedule, which changes no bit."""
        return contextlib.nullcontext()


def _function(target: Target, op: Operator) -> Callable[..., Any] | None:
    """Of the operator's own file, or the one that says ``@implements``."""
    from llm42c.codegen.ops.registry import implemented

    return op.implementations.get(target.name) or implemented(target.name).get(op.name)


_added: list[Target] = []


@functools.cache
def _found() -> tuple[Target, ...]:
    from llm42c import codegen

    modules = [
        importlib.import_module(f"{codegen.__name__}.{folder.name}.target")
        for folder in pkgutil.iter_modules(codegen.__path__)
        if folder.ispkg and importlib.util.find_spec(f"{codegen.__name__}.{folder.name}.target")
    ]
    return tuple(module.TARGET for module in modules)


def targets() -> tuple[Target, ...]:
    """All targets: those that were :func:`add`-ed stand in for those of the same devices."""
    taken = {target.device_type for target in _added}
    return (*(t for t in _found() if t.device_type not in taken), *_added)


def add(target: Target) -> None:
    """Take a target of another package. Call it before the first operator is registered."""
    _added.append(target)


def of(device: torch.device) -> Target:
    """The target of a device. Raises TargetUnavailableError if there is none."""
    for target in targets():
        if target.device_type == device.type:
            return target
    known = ", ".join(target.device_type for target in targets())
    raise TargetUnavailableError(f"there are operators for devices of type {known}, none for {device}")


def named(name: str) -> Target:
    """The target called ``name``. Raises KeyError."""
    return {target.name: target for target in targets()}[name]
