"""Definition of operators and their registration with torch, on demand and once a process.

Nothing is registered by an import: :func:`load` is called by whoever first needs an operator (the
backend, the engine, a test).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NAMESPACE = "llm42"


@dataclass(frozen=True)
class Operator:
    """One operator: what it is called with, what it returns, and in which order it reduces.

    ``schema`` is the torch schema without the namespace, e.g. ``"silu_mul(Tensor x) -> Tensor"``.
    ``fake`` computes shapes, dtypes and strides without data.
    ``reference`` is the specification, in fp64 (or exactly rounded steps) on plain torch tensors.
    ``reduction`` states the order of every sum in one sentence; ``"none"`` for pointwise operators.
    ``backward``/``setup_context`` are given to ``torch.library.register_autograd``; torch warns when
    something is differentiated through an operator without them. Such a formula is Python code that runs
    at every call outside ``torch.inference_mode()``, also under ``no_grad``, and costs microseconds.
    ``composite`` is an implementation in Python on CPU tensors, with ``on_cuda`` on CUDA tensors too.
    """

    schema: str
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    reduction: str
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., Any] | None = None
    composite: Callable[..., Any] | None = None
    on_cuda: bool = False

    @property
    def name(self) -> str:
        return self.schema.split("(", 1)[0]

    @property
    def qualname(self) -> str:
        return f"{NAMESPACE}::{self.name}"

    @property
    def overload(self) -> Any:
        """The ``torch.ops`` overload (after :func:`load`)."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


_lock = threading.Lock()
_library: torch.library.Library | None = None


def operators() -> dict[str, Operator]:
    """All operators by name."""
    from llm42c.codegen.ops import catalog

    return {op.name: op for op in catalog.OPERATORS}


def define() -> None:
    """Register schemas, fakes and autograd formulas with torch. Needs no compiler; idempotent."""
    global _library
    with _lock:
        if _library is not None:
            return
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        for op in operators().values():
            library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
            torch.library.register_fake(op.qualname, op.fake, lib=library)
            if op.backward is not None:
                torch.library.register_autograd(
                    op.qualname, op.backward, setup_context=op.setup_context, lib=library
                )
            if op.composite is not None:
                library.impl(op.name, op.composite, "CPU")
                if op.on_cuda:
                    library.impl(op.name, op.composite, "CUDA")
        from llm42c.codegen.triton import register

        register.register(library)
        _library = library


def load() -> None:
    """:func:`define`, then compile (or take from the cache) and load the CPU kernels. Idempotent.

    Raises ``codegen.cpu.build.BuildError`` when no working C++ compiler is found.
    """
    define()
    from llm42c.codegen.cpu import build

    build.load_library()
