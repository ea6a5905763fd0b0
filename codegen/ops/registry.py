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

from llm42c.codegen.operator import NAMESPACE, Operator, implementations_in, operators_in

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
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
def launchers() -> dict[str, Callable[..., Any]]:
    """Who launches each operator's kernel on a GPU: the functions of ``codegen/triton`` that say so."""
    modules = [*_modules("llm42c.codegen.triton"), *_added]
    return {i.name: i.function for m in modules for i in implementations_in(m) if i.target == "cuda"}


def is_computed_on(name: str, target: str) -> bool:
    """Whether the operator has an implementation on ``target``. On "cpu", of the kernels that are loaded."""
    op = operators()[name]
    if target == "cuda":
        return name in launchers() or target in op.implementations
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(op.qualname, _DISPATCH_KEYS[target])
    return found


def implementations() -> dict[str, dict[str, str]]:
    """Operator → target → where it is computed. Loads the kernels of this machine."""
    load()
    found: dict[str, dict[str, str]] = {}
    for name, op in operators().items():
        where = {target: f.__module__ for target, f in op.implementations.items()}
        if name in launchers():
            where.setdefault("cuda", launchers()[name].__module__)
        if is_computed_on(name, "cpu"):
            where.setdefault("cpu", "llm42c.codegen.cpu")
        found[name] = where
    return found


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
        launchers.cache_clear()
        for module in modules:
            for found in implementations_in(module):
                if found.target != "cuda":
                    operators()[found.name].implementations[found.target] = found.function
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
    for target, function in {"cuda": _launch(op.name), **op.implementations}.items():
        library.impl(op.name, function, _DISPATCH_KEYS[target])


def _launch(name: str) -> Callable[..., Any]:
    """Calls the operator's launcher. Emitters are imported by the first call on a GPU, and Triton by them."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        if name not in launchers():
            raise NotImplementedError(f"{NAMESPACE}::{name} has no implementation for GPUs")
        return launchers()[name](*args, **kwargs)

    return launch


def load() -> None:
    """:func:`define`, then compile (or take from the cache) and load the CPU kernels. Idempotent.

    Raises ``codegen.cpu.build.BuildError`` when no working C++ compiler is found.
    """
    define()
    from llm42c.codegen.cpu import build

    build.load_library()


def orders_of(names: Iterable[str], target: str) -> dict[str, str]:
    """``name/version`` of each operator's order on ``target``, by operator."""
    return {name: str(operators()[name].orders[target]) for name in sorted(set(names))}
