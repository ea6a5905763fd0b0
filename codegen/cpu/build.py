"""Compile the C++ kernels once, keep the library in the user's cache folder, and load it.

The cache key covers the sources, the compiler, its flags, torch and the CPU's instruction set, so a
new torch, an edited kernel or another machine under the same home folder never loads a stale file.

A wheel made with ``make wheel`` carries the library for each of ``ISAS``, and nothing is compiled then.
The library sees torch through its stable C interface alone: one serves every torch from ``TORCH_TARGET`` on.

The kernels give the same bits for every instruction set. ``LLM42_ISA`` in the environment, read when the
library is loaded, chooses one of ``ISAS``; without it the first that the CPU can run is used.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from llm42c.codegen import cache

SOURCE_DIR = Path(__file__).parent
CARRIED_DIR = SOURCE_DIR / "carried"
ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # best first
ISA_VARIABLE = "LLM42_ISA"
_AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
_ISA_FLAGS = {
    "avx512_bf16": [*_AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"],
    "avx512": _AVX512_FLAGS,
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    # The portable form of vec.h; the compiler may still vectorise its loops with what the CPU has.
    "portable": ["-march=native", "-DLLM42_GENERIC_VEC=1"],
}
# A wheel carries all of them; its portable library runs on every CPU of the architecture.
_CARRIED_FLAGS = _ISA_FLAGS | {"portable": ["-DLLM42_GENERIC_VEC=1"]}
# Flags of /proc/cpuinfo that a CPU must have to run the library of an instruction set.
_AVX512_NEEDS = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"}
NEEDS = {
    "avx512_bf16": _AVX512_NEEDS | {"avx512_bf16", "avx512_vnni"},
    "avx512": _AVX512_NEEDS,
    "avx2": {"avx2", "fma", "f16c"},
}
# Contraction is off: a fused multiply-add happens exactly where a kernel writes one.
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno"]
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, the oldest that pyproject.toml allows
_lock = threading.Lock()
NO_COMPILER = "none"
_loaded: tuple[str, Path] | None = None  # instruction set, library


class BuildError(RuntimeError):
    """The C++ kernels could not be compiled."""


@dataclass(frozen=True)
class Toolchain:
    compiler: str
    version: str

    @classmethod
    def find(cls) -> Toolchain:
        """The compiler named by ``$CXX``, else g++, else clang++."""
        wanted = os.environ.get("CXX")
        for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
            path = shutil.which(name)
            if path:
                out = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
                return cls(path, out.stdout.splitlines()[0] if out.stdout else path)
        raise BuildError(
            f"no C++ compiler found ({'$CXX=' + wanted if wanted else 'g++ and clang++ were tried'}): "
            "install one, for example with 'apt-get install g++'"
        )


@functools.cache
def cpu_features() -> str:
    """Model and instruction-set flags of this CPU, as one string."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    keys: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        keys.setdefault(key.strip(), value.strip())
    return f"{platform.machine()} {keys.get('model name', '')} {keys.get('flags', keys.get('Features', ''))}"


def compiler_version() -> str:
    """Of the compiler that Inductor would use, too; NO_COMPILER where there is none."""
    try:
        return Toolchain.find().version
    except BuildError:
        return NO_COMPILER


def sources() -> list[Path]:
    return sorted([*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("kernels/*.cpp")])


def all_sources() -> list[Path]:
    """Everything that is compiled, headers included."""
    return sorted([*sources(), *SOURCE_DIR.rglob("*.h")])


def _torch_flags(added: bool) -> tuple[list[str], list[str]]:
    """To compile and to link. No path is kept: torch is loaded when the library is.

    ``added`` sources may use all of torch's C++ interface, ours use the stable one.
    """
    root = Path(torch.__file__).parent
    include, link = [f"-I{root / 'include'}"], [f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu"]
    if not added:
        return [TORCH_TARGET, *include], link
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [abi, *include, f"-I{root / 'include/torch/csrc/api/include'}"], [*link, "-lc10"]


def build_key(isa: str, added: tuple[Path, ...] = (), *, carried: bool = False) -> str:
    """Hash of everything that the compiled library, or one of ``added`` sources, depends on.

    ``carried``: of the library that a wheel carries.
    """
    digest = hashlib.sha256()
    for path in (*all_sources(), *added):
        name = path.name if path in added else path.relative_to(SOURCE_DIR).as_posix()
        digest.update(name.encode())
        digest.update(path.read_bytes())
    flags = [*FLAGS, *_isa_flags(isa, carried)]
    for item in (Toolchain.find().version, *flags, torch.__version__, cpu_features()):
        digest.update(item.encode() + b"\0")
    return digest.hexdigest()[:20]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        tail = "\n".join(result.stderr.strip().splitlines()[-25:])
        raise BuildError(f"compiling the CPU kernels failed: {' '.join(command)}\n{tail}")


def _isa_flags(isa: str, carried: bool) -> list[str]:
    return (_CARRIED_FLAGS if carried else _ISA_FLAGS)[isa]


def _compile(out: Path, isa_flags: list[str], added: tuple[Path, ...]) -> None:
    """Write the library into the cache: its name appears when it is whole."""
    if not cache.write(out, compiled(isa_flags, added), seal=True):
        raise OSError(f"{out} cannot be written")


def compiled(isa_flags: list[str], added: tuple[Path, ...] = ()) -> bytes:
    """The library, by way of a folder for temporary files. Raises BuildError."""
    compiler = Toolchain.find().compiler
    include, link = _torch_flags(bool(added))
    with tempfile.TemporaryDirectory(prefix="llm42-build-", ignore_cleanup_errors=True) as tmp:
        flags = [*FLAGS, *isa_flags, f"-I{SOURCE_DIR}"]

        def compile_one(source: Path) -> str:
            target = str(Path(tmp) / (source.stem + ".o"))
            extra = [] if source.parent == SOURCE_DIR / "kernels" else include  # which does not see torch
            _run([compiler, *flags, *extra, "-c", str(source), "-o", target])
            return target

        with concurrent.futures.ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, added or sources()))
        library = Path(tmp) / "kernels.so"
        _run([compiler, "-shared", "-fopenmp", *objects, "-o", str(library), *link])
        return library.read_bytes()


def carry(folder: Path) -> None:
    """Put what a wheel carries into the package of which ``folder`` is the copy of this one.

    It is taken from the cache where the same was compiled before.
    """
    for isa in ISAS:
        path = folder / CARRIED_DIR.name / carried_name(isa)
        path.parent.mkdir(exist_ok=True)
        library = cache.sealed(_kept(isa, (), carried=True))
        if library is None:
            raise BuildError(f"the {isa} library in the cache was removed meanwhile: try again")
        path.write_bytes(library)


def carried_name(isa: str) -> str:
    """Of sources and flags: a wheel whose sources were edited does not load what was made of others."""
    digest = hashlib.sha256()
    for path in all_sources():
        digest.update(path.relative_to(SOURCE_DIR).as_posix().encode())
        digest.update(path.read_bytes())
    for item in (*FLAGS, TORCH_TARGET, *_CARRIED_FLAGS[isa]):
        digest.update(item.encode() + b"\0")
    return f"llm42_cpu_{isa}_{digest.hexdigest()[:20]}.so"


def carried(isa: str) -> Path | None:
    """The library for ``isa`` that this package carries."""
    path = CARRIED_DIR / carried_name(isa)
    return path if path.is_file() else None


def chosen_isa() -> str:
    """What ``LLM42_ISA`` names, else :func:`widest_isa`. Raises BuildError for what is not in ``ISAS``."""
    isa = os.environ.get(ISA_VARIABLE) or widest_isa()
    if isa not in ISAS:
        raise BuildError(f"{ISA_VARIABLE}={isa}: expected one of {', '.join(ISAS)}")
    return isa


def widest_isa() -> str:
    """The first of ``ISAS`` that this CPU can run."""
    features = set(cpu_features().split())
    return next(isa for isa in ISAS if NEEDS.get(isa, set()) <= features)


def require_isa(isa: str) -> None:
    """Raise BuildError if this CPU cannot run the library of ``isa``."""
    missing = NEEDS.get(isa, set()) - set(cpu_features().split())
    if missing:
        raise BuildError(
            f"this CPU cannot run {isa} kernels, it lacks {', '.join(sorted(missing))}: "
            f"unset {ISA_VARIABLE}, or set it to portable"
        )


def build(isa: str | None = None, added: tuple[Path, ...] = ()) -> Path:
    """Path of the library for ``isa`` (by default :func:`chosen_isa`): carried, cached or compiled.

    ``added``: of these sources instead of ours, which may include our headers and torch's.
    Raises BuildError without a working compiler, and for an instruction set that this CPU lacks.
    """
    isa = isa or chosen_isa()
    if isa not in ISAS:
        raise ValueError(f"isa {isa!r}: expected one of {', '.join(ISAS)}")
    require_isa(isa)
    if missing := [str(path) for path in added if not path.is_file()]:
        raise BuildError(f"there is no C++ source {', '.join(missing)}")
    if not added and (ready := carried(isa)) is not None:
        return ready
    return _kept(isa, added)


def _kept(isa: str, added: tuple[Path, ...], *, carried: bool = False) -> Path:
    """Path of the library in the cache, compiled if it is not there; aside of a cache that cannot be used."""
    name = f"llm42_{'added' if added else 'cpu'}_{isa}_{build_key(isa, added, carried=carried)}.so"
    out, flags = cache.folder() / "kernels" / name, _isa_flags(isa, carried)
    if cache.sealed(out) is not None:
        return out
    if cache.place("kernels") is not None:
        try:
            with filelock.FileLock(str(out) + ".lock"):
                if cache.sealed(out) is None:
                    _compile(out, flags, added)
            return out
        except OSError as error:
            cache.trouble(error)
    return _build_aside(name, flags, added)


_aside_lock = threading.Lock()


def _build_aside(name: str, isa_flags: list[str], added: tuple[Path, ...]) -> Path:
    """The library in this process's temporary folder."""
    with _aside_lock:
        try:
            out = cache.temporary() / name
            if cache.sealed(out) is None:
                _compile(out, isa_flags, added)
        except OSError as error:
            raise BuildError(
                f"the CPU kernels can be compiled nowhere: {error}; set XDG_CACHE_HOME or TMPDIR to a folder "
                "that can be written"
            ) from error
    return out


def load_library(isa: str | None = None) -> Path:
    """Load the kernels into torch; returns the library's path. One instruction set a process.

    ``isa``: one of ``ISAS``, by default :func:`chosen_isa`. Raises BuildError for one that this CPU lacks,
    and for another than is loaded already.
    """
    global _loaded
    with _lock:
        isa = isa or (chosen_isa() if _loaded is None else _loaded[0])
        if _loaded is not None:
            if _loaded[0] != isa:
                raise BuildError(f"the kernels are loaded for {_loaded[0]}; {isa} needs a process of its own")
            return _loaded[1]
        path = build(isa)
        torch.ops.load_library(str(path))
        _loaded = (isa, path)
        return path


def load_added(sources: tuple[Path, ...]) -> None:
    """Load kernels of another package into torch, for the instruction set of ours. Idempotent.

    Raises BuildError as :func:`load_library`, and where a source cannot be read or compiled.
    """
    load_library()
    torch.ops.load_library(str(build(None if _loaded is None else _loaded[0], sources)))


def loaded_library() -> Path | None:
    """The library that :func:`load_library` has loaded."""
    return None if _loaded is None else _loaded[1]
