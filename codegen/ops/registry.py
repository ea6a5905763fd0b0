"""All operators, who computes them, and their registration with torch, on demand and once a process.

Nothing is registered by an import: :func:`load` is called by whoever first needs an operator (the
backend, the engine, a test).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch

from llm42c.codegen import targets
from llm42c.codegen.operator import (
    NAMESPACE,
    Implementation,
    Operator,
    implementations_in,
    operators_in,
)

_lock = threading.RLock()
_added: list[ModuleType] = []
_library: torch.library.Library | None = None
_defined: set[str] = set()


def _modules(package: str) -> Iterator[ModuleType]:
    """The modules of a package, by name."""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        yield importlib.import_module(f"{package}.{found.name}")


@functools.cache
def operators() -> dict[str, Operator]:
    """All operators by name: of the modules of ``codegen/ops``, and of those that were :func:`add`-ed."""
    modules = [*_modules("llm42c.codegen.ops"), *_added]
    return {
        op.name: op for op in sorted((op for m in modules for op in operators_in(m)), key=lambda op: op.name)
    }


def our_operator(name: str) -> Operator | None:
    """The operator that ``llm42::name`` means; None for a name of another namespace."""
    prefix, _, own = name.partition("::")
    return operators().get(own) if prefix == NAMESPACE else None


@functools.cache
def marked(target: str) -> tuple[Implementation, ...]:
    """What says ``@implements(…, target)``, in a target's folder or an added module."""
    packages = [type(t).__module__.rpartition(".")[0] for t in targets.targets() if t.name == target]
    modules = [*(m for package in packages for m in _modules(package)), *_added]
    return tuple(i for m in modules for i in implementations_in(m) if i.target == target)


@functools.cache
def implemented(target: str) -> dict[str, Callable[..., Any]]:
    """Operator → the function that says ``@implements(…, target)``."""
    return {i.name: i.function for i in marked(target)}


def implementations() -> dict[str, dict[str, str]]:
    """Operator → target → who computes it. Loads the kernels of this machine."""
    load()
    places = {name: {t.name: t.where(op) for t in targets.targets()} for name, op in operators().items()}
    return {name: {t: place for t, place in found.items() if place} for name, found in places.items()}


def add(*modules: ModuleType) -> list[Operator]:
    """Take the operators that ``modules`` declare and what they implement, of another package or file.

    Returns the operators. Raises ValueError for a name that another operator has.
    """
    new = [op for module in modules for op in operators_in(module)]
    for op in new:
        if operators().get(op.name, op) is not op:
            raise ValueError(f"there is an operator {op.qualname} already: {op.module} needs another name")
    with _lock:
        _added.extend(m for m in modules if m not in _added)
        operators.cache_clear()
        marked.cache_clear()
        implemented.cache_clear()
        if _library is not None:
            define()
    return new


def define() -> None:
    """Register schemas, fakes and autograd formulas with torch. Needs no compiler; idempotent."""
    global _library
    with _lock:
        library = _library or torch.library.Library(NAMESPACE, "FRAGMENT")
        for op in operators().values():
            if op.name not in _defined:
                _define(library, op)
                _defined.add(op.name)
        _library = library


def _define(library: torch.library.Library, op: Operator) -> None:
    library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    torch.library.register_fake(op.qualname, op.meta, lib=library)
    if op.backward is not None:
        torch.library.register_autograd(op.qualname, op.backward, setup_context=op.setup_context, lib=library)
    for target in targets.targets():
        if (function := target.launcher(op)) is not None:
            library.impl(op.name, function, target.dispatch_key)


def load(device: torch.device | None = None) -> None:
    """:func:`define`, then load what computes the operators on ``device`` (by default the CPU). Idempotent.

    Raises ``codegen.cpu.build.BuildError`` when no working C++ compiler is found, and
    ``targets.TargetUnavailableError`` for a device without operators.
    """
    define()
    targets.of(device or torch.device("cpu")).load()


def orders_of(names: Iterable[str], target: str) -> dict[str, str]:
    """``name/version`` of each operator's order on ``target``, by operator."""
    return {name: str(targets.named(target).order(operators()[name])) for name in sorted(set(names))}
