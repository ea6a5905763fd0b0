"""CPUs: C++ kernels, compiled once by the user's compiler, which register themselves."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from llm42c.codegen.cpu import build
from llm42c.codegen.cpu import device as devices
from llm42c.codegen.cpu.packing import Panels
from llm42c.codegen.device import Device, Value, measure
from llm42c.codegen.implementation import digest_of
from llm42c.codegen.operator import Operator
from llm42c.codegen.ops.registry import operators
from llm42c.codegen.targets import Target


class CpuTarget(Target):
    """Bits hang on nothing else: every instruction set computes the same orders."""

    name = "cpu"
    device_type = "cpu"
    dispatch_key = "CPU"
    packing = Panels()

    def prepare(self) -> None:
        """Compile the kernels. Raises as :meth:`load`."""
        build.build()
        for sources in _added():
            build.build(added=sources)

    def load(self) -> None:
        """Raises ``build.BuildError`` when no working C++ compiler is found."""
        build.load_library()
        for sources in _added():
            build.load_added(sources)

    def where(self, op: Operator) -> str | None:
        """C++ of the kernels that are loaded."""
        has: bool = torch._C._dispatch_has_kernel_for_dispatch_key(op.qualname, self.dispatch_key)
        own = ", ".join(source.name for source in op.compiled_from.get(self.name, ()))
        return super().where(op) or ((own or __package__) if has else None)

    def sources(self) -> dict[str, str]:
        return {"kernels": kernels_digest()}

    def identity(self, device: torch.device, foreign: bool, threads: bool) -> dict[str, str]:
        """Nothing, unless other libraries compute something: then what their code hangs on."""
        if not foreign:
            return {}
        found = {
            "torch": torch.__version__,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "cpu": hashlib.sha256(build.cpu_features().encode()).hexdigest()[:16],
            "libc": " ".join(platform.libc_ver()),
            "compiler": build.compiler_version(),
        }
        return found | ({"threads": str(torch.get_num_threads())} if threads else {})

    def detect(self, index: int = 0) -> Device:
        return devices.detect()

    def rates(self) -> dict[str, Value]:
        return devices.rates()

    def rates_now(self) -> dict[str, Value]:
        return devices.rates_now()

    @contextlib.contextmanager
    def step(self, decode_workers: int | None = None) -> Iterator[None]:
        """``decode_workers`` threads begin with decodes; by default as many as fill the memory.

        Outside of a step, all threads take what is longest. Raises ValueError for a negative number.
        """
        workers = filling_the_memory() if decode_workers is None else decode_workers
        if workers < 0:
            raise ValueError(f"decode_workers must not be negative, got {workers}")
        before = _set_decode_workers()(workers)
        try:
            yield
        finally:
            _set_decode_workers()(before)


def _added() -> list[tuple[Path, ...]]:
    """The C++ of operators that stand in other packages."""
    return [op.compiled_from["cpu"] for op in operators().values() if "cpu" in op.compiled_from]


@functools.cache
def filling_the_memory() -> int:
    """How many threads do, as measured here."""
    return devices.decode_workers(measure(TARGET.detect(), TARGET.rates))


@functools.cache
def _set_decode_workers() -> Callable[[int], int]:
    """Sets the schedule of this thread's calls, and returns the one before."""
    function = ctypes.CDLL(str(build.load_library())).llm42_decode_workers
    function.argtypes, function.restype = (ctypes.c_int64,), ctypes.c_int64
    return function


@functools.cache
def kernels_digest() -> str:
    """Of the C++ kernels, and of the flags that all instruction sets are compiled with."""
    return digest_of(build.all_sources(), *build.FLAGS)


TARGET = CpuTarget()
