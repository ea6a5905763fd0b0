"""From text to kernels: the cache of emitted files, compilation ahead of time, and what a binary uses."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm42c.codegen.target import Target

# Contraction is off: a fused multiply-add happens exactly where a kernel writes one.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


def cache_dir() -> Path:
    """Where emitted files are kept: readable, one a kernel."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("llm42")) / "triton"


def versions() -> dict[str, str]:
    """What a compiled kernel depends on besides its text and target."""
    import torch
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}


def cache_key(source: str, target: Target | None = None, options: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of text, target, launch options and versions."""
    parts = [source, target.hash if target else "", repr(sorted((options or {}).items()))]
    parts.append(repr(sorted(versions().items())))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(name: str, source: str, target: Target | None = None) -> Any:
    """The function ``name`` of an emitted file, after writing the file to the cache."""
    return _load(name, source, cache_key(source, target), cache_dir())


@functools.cache
def _load(name: str, source: str, key: str, folder: Path) -> Any:
    path = folder / f"{name}-{key[:16]}.py"
    if not path.exists() or path.read_text() != source:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(source)
        scratch.replace(path)
    spec = importlib.util.spec_from_file_location(f"llm42_emitted_{name}_{key[:16]}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import the emitted kernel {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel asks of a device; spills in bytes (CUDA) or registers (HIP)."""

    registers: int
    spills: int
    shared: int
    warps: int


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a device that need not be here."""

    name: str
    target: Target
    resources: Resources
    asm: dict[str, str]


def compile_ahead(
    name: str,
    source: str,
    signature: Mapping[str, str],
    target: Target,
    *,
    constants: Mapping[str, Any] | None = None,
    warps: int = 4,
    stages: int = 2,
) -> Compiled:
    """Compile for ``target`` without its hardware. ``signature``: Triton's type of every argument.

    Pointers and strides are taken to be multiples of 16, as they are for ordinary tensors.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = load(name, source, target)
    fixed = dict(constants or {})
    full = {n: "constexpr" if n in fixed else signature[n] for n in fn.arg_names}
    aligned = [i for i, n in enumerate(fn.arg_names) if full[n].startswith("*")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    ast = ASTSource(
        fn=fn,
        signature=full,
        constexprs={(fn.arg_names.index(n),): v for n, v in fixed.items()},
        attrs=attributes,
    )
    if target.kind == "cuda":
        where = GPUTarget("cuda", target.capability, 32)
    else:
        where = GPUTarget("hip", target.arch, 64)
    options = {**OPTIONS, "num_warps": warps, "num_stages": stages}
    built = triton.compile(ast, target=where, options=options)
    asm = {k: v for k, v in built.asm.items() if isinstance(v, str)}
    registers, spills = (
        _amd_usage(asm["amdgcn"]) if target.kind == "hip" else _ptxas_usage(asm["ptx"], target)
    )
    shared = built.metadata.shared
    return Compiled(name, target, Resources(registers, spills, shared, warps), asm)


def _amd_usage(text: str) -> tuple[int, int]:
    """(vector registers, spilled vector registers) of an AMD assembly listing."""
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    spills = max(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
    return registers, spills


def _ptxas_usage(ptx: str, target: Target) -> tuple[int, int]:
    """(registers, spilled bytes) as the assembler that comes with Triton reports them."""
    import triton

    bin_dir = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = bin_dir / "ptxas-blackwell"
    ptxas = blackwell if target.capability >= 100 and blackwell.exists() else bin_dir / "ptxas"
    suffix = "a" if target.capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(ptxas), "-v", "--fmad=false", f"--gpu-name={target.arch}{suffix}", str(path)]
        command += ["-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas failed: {done.stderr}")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = [
        int(a) + int(b)
        for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    ]
    return max(registers), max(spills, default=0)
