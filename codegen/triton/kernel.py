"""From text to kernels: the cache of emitted files, compilation ahead of time, and what a binary uses."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm42c.codegen import cache
from llm42c.codegen.device import Device

# Contraction is off: a fused multiply-add happens exactly where a kernel writes one.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


def aligned(x: Any) -> Any:
    """``x``, or a copy of it whose data begins at, and whose rows are apart by, a multiple of 16.

    Triton compiles another binary for arguments that are not, and other binaries may add in another order.
    So every launch has pointers and strides that are multiples of 16 wherever the row's length allows it;
    arguments that follow the batch are not specialised at all.
    """
    dense = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
    strides = list(x.stride())
    even = strides[-1:] == dense[-1:] and all(s % 16 == 0 for s in strides[:-1])
    if x.data_ptr() % 16 == 0 and (strides == dense or even):
        return x
    return x.new_empty(x.shape).copy_(x)


def cache_dir() -> Path:
    """Where emitted files are kept, readable, one a kernel; and what they compiled to ahead of time.

    What a launch compiles is in Triton's own cache, under a key of text, device, options and versions.
    """
    return cache.folder() / "triton"


def versions() -> dict[str, str]:
    """What a compiled kernel depends on besides its text and device."""
    import torch
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}


def cache_key(source: str, target_hash: str = "", options: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of text, device, launch options and versions."""
    parts = [source, target_hash, repr(sorted((options or {}).items()))]
    parts.append(repr(sorted(versions().items())))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(name: str, source: str, device: Device | None = None) -> Any:
    """The function ``name`` of an emitted file, after writing the file to the cache."""
    return _load(name, source, device.hash if device else "", cache_dir())


@functools.cache
def _load(name: str, source: str, target_hash: str, folder: Path) -> Any:
    key = cache_key(source, target_hash)
    path = folder / f"{name}-{key[:16]}.py"
    if _read(path) != source and not cache.write(path, source):
        path = cache.temporary() / path.name
        path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"llm42_emitted_{name}_{key[:16]}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import the emitted kernel {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def registers_for(device: Device, warps: int) -> dict[str, int]:
    """Launch option that lets a kernel of so many warps use all registers that a thread can have.

    Without it ptxas may spill some to make room for one more block. Not known on AMD.
    """
    return {"maxnreg": min(255, 65536 // (32 * warps))} if device.kind == "cuda" else {}


def divisible(fn: Any, signature: Mapping[str, str]) -> list[int]:
    """Numbers of the arguments that are multiples of 16 at every launch."""
    free = {p.name for p in fn.params if p.do_not_specialize}
    integers = ("*", "i32", "i64")
    return [i for i, n in enumerate(fn.arg_names) if signature[n].startswith(integers) and n not in free]


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel asks of a device; spills in bytes (CUDA) or registers (HIP)."""

    registers: int
    spills: int
    shared: int
    warps: int


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a device that need not be here. asm: "ttgir", and "ptx" or "amdgcn"."""

    name: str
    device: Device
    resources: Resources
    asm: dict[str, str]


def compile_ahead(
    name: str,
    source: str,
    signature: Mapping[str, str],
    device: Device,
    *,
    constants: Mapping[str, Any] | None = None,
    warps: int = 4,
    stages: int = 2,
    all_registers: bool = False,
) -> Compiled:
    """Compile for ``target`` without its hardware. ``signature``: Triton's type of every argument.

    Pointers, and integers that are specialised, are taken to be multiples of 16: see :func:`aligned`. What
    was compiled once is taken from the cache.
    """
    options = {**OPTIONS, "num_warps": warps, "num_stages": stages}
    options |= registers_for(device, warps) if all_registers else {}
    fixed = dict(constants or {})
    key = cache_key(source, device.hash, {**options, "signature": repr(signature), "constants": repr(fixed)})
    path = cache_dir() / f"{name}-{key[:16]}.json"
    kept = _compiled_before(path, key)
    if kept is None:
        kept = _compile(name, source, signature, device, fixed, options)
        cache.write(path, json.dumps({"key": key, **kept}))
    return Compiled(name, device, Resources(**kept["resources"]), kept["asm"])


def _compiled_before(path: Path, key: str) -> dict[str, Any] | None:
    """What :func:`_compile` returned for this key, if the cache has it whole."""
    try:
        found: dict[str, Any] = json.loads(_read(path) or "null")
        return {n: found[n] for n in ("resources", "asm")} if found["key"] == key else None
    except (json.JSONDecodeError, TypeError, KeyError):
        return None


def _compile(
    name: str,
    source: str,
    signature: Mapping[str, str],
    device: Device,
    fixed: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """{"resources": ..., "asm": ...} as JSON takes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = load(name, source, device)
    full = {n: "constexpr" if n in fixed else signature[n] for n in fn.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible(fn, full)}
    ast = ASTSource(
        fn=fn,
        signature=full,
        constexprs={(fn.arg_names.index(n),): v for n, v in fixed.items()},
        attrs=attributes,
    )
    if device.kind == "cuda":
        where = GPUTarget("cuda", device.capability, 32)
    else:
        where = GPUTarget("hip", device.arch, 64)
    built = triton.compile(ast, target=where, options=dict(options))
    asm = {k: built.asm[k] for k in ("ttgir", "ptx", "amdgcn") if k in built.asm}
    registers, spills = (
        _amd_usage(asm["amdgcn"]) if device.kind == "hip" else _ptxas_usage(asm["ptx"], device)
    )
    used = Resources(registers, spills, built.metadata.shared, options["num_warps"])
    return {"resources": dataclasses.asdict(used), "asm": asm}


def _amd_usage(text: str) -> tuple[int, int]:
    """(vector registers, spilled vector registers) of an AMD assembly listing."""
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    spills = max(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
    return registers, spills


def _ptxas_usage(ptx: str, device: Device) -> tuple[int, int]:
    """(registers, spilled bytes) as the assembler that comes with Triton reports them."""
    import triton

    bin_dir = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = bin_dir / "ptxas-blackwell"
    ptxas = blackwell if device.capability >= 100 and blackwell.exists() else bin_dir / "ptxas"
    suffix = "a" if device.capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(ptxas), "-v", "--fmad=false", f"--gpu-name={device.arch}{suffix}", str(path)]
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
