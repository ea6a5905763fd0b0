"""CPUs: C++ kernels, compiled once by the user's compiler, which register themselves."""

from __future__ import annotations

import functools
import hashlib
import platform

import torch

from llm42c.codegen.cpu import build
from llm42c.codegen.cpu.packing import Panels
from llm42c.codegen.device import local_decode_workers
from llm42c.codegen.implementation import digest_of
from llm42c.codegen.operator import Operator
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

    def load(self) -> None:
        """Raises ``build.BuildError`` when no working C++ compiler is found."""
        build.load_library()

    def where(self, op: Operator) -> str | None:
        """C++ of the kernels that are loaded."""
        has: bool = torch._C._dispatch_has_kernel_for_dispatch_key(op.qualname, self.dispatch_key)
        return super().where(op) or (__package__ if has else None)

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
            "compiler": build.Toolchain.find().version,
        }
        return found | ({"threads": str(torch.get_num_threads())} if threads else {})

    def decode_workers(self) -> int:
        return local_decode_workers()


@functools.cache
def kernels_digest() -> str:
    """Of the C++ kernels, and of the flags that all instruction sets are compiled with."""
    return digest_of(build.all_sources(), *build.FLAGS)


TARGET = CpuTarget()
