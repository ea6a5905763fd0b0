"""Compilation of the CPU kernels: cache, errors, concurrency; one set of bits for all instruction sets."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm42c.codegen import cache
from llm42c.codegen.cpu import build

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source folder of one small file, and an empty cache. → the source"""
    folder = tmp_path / "source"
    (folder / "kernels").mkdir(parents=True)
    source = folder / "kernels" / "answer.cpp"
    source.write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCE_DIR", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return source


def test_a_second_build_takes_the_cache(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.build()
    assert path.exists()
    assert path.is_relative_to(cache.folder())
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail(f"compiled again: {command}"))
    assert build.build() == path


def test_a_wheel_takes_what_was_compiled_before(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    build.carry(first)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_run", lambda command: pytest.fail(f"compiled again: {command}"))
        build.carry(second)
        for isa in build.ISAS:
            same = build._CARRIED_FLAGS[isa] == build._ISA_FLAGS[isa]
            assert same == (isa != "portable")
            if same and build.NEEDS[isa] <= set(build.cpu_features().split()):
                assert build.build(isa).is_relative_to(cache.folder())
    assert _contents(first) == _contents(second)
    assert _contents(first).keys() == set(map(build.carried_name, build.ISAS))
    tiny.write_text(SOURCE.replace("42", "43"))  # what was compiled before is of another source
    build.carry(second)
    assert _contents(first).keys().isdisjoint(map(build.carried_name, build.ISAS))
    assert all(_contents(second)[build.carried_name(isa)] for isa in build.ISAS)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.so")}


def test_the_key_covers_sources_headers_flags_and_torch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [build.build_key("avx2"), build.build_key("portable"), build.build_key("portable", carried=True)]
    tiny.write_text(SOURCE.replace("42", "43"))
    keys.append(build.build_key("avx2"))
    (tiny.parent / "answer.h").write_text("#pragma once\n")
    keys.append(build.build_key("avx2"))
    monkeypatch.setattr(build.torch, "__version__", "0.0")
    keys.append(build.build_key("avx2"))
    monkeypatch.setattr(build, "cpu_features", lambda: "another processor")
    keys.append(build.build_key("avx2"))
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    keys.append(build.build_key("avx2"))
    assert len(set(keys)) == len(keys)
    assert build.build_key("avx2") == keys[-1]


def test_without_a_compiler(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found.*install one"):
        build.build()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"\$CXX=no-such-compiler"):
        build.build()


def test_a_compile_error_is_shown_and_leaves_nothing(tiny: Path) -> None:
    tiny.write_text("int answer() { return forty_two; }\n")
    with pytest.raises(build.BuildError, match="forty_two"):
        build.build()
    assert not list(cache.folder().rglob("*.so"))
    tiny.write_text(SOURCE)
    assert build.build().exists()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What this process has said of its cache folder since."""
    monkeypatch.setattr(cache, "_told", set())
    return lambda: [r.getMessage() for r in caplog.records if r.name == cache.__name__]


def _elsewhere(path: Path) -> bool:
    return path.is_file() and path.is_relative_to(cache.temporary())


def test_a_cache_path_that_is_a_file(tiny: Path, monkeypatch: Any, told: Callable[[], list[str]]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny))
    assert _elsewhere(build.build())
    (line,) = told()
    assert "set XDG_CACHE_HOME to a folder that can be written" in line
    assert "\n" not in line
    assert _elsewhere(build.build())  # compiled once, told once
    assert len(told()) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk(
    number: int, tiny: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    real = tempfile.mkstemp

    def refuse(*args: Any, dir: Path, **kwargs: Any) -> Any:
        if Path(dir).is_relative_to(cache.folder()):
            raise OSError(number, os.strerror(number), str(dir))
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert _elsewhere(build.build())
    (line,) = told()
    assert os.strerror(number) in line


def test_a_disk_that_fills_while_the_library_is_written(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]
) -> None:
    real = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.is_relative_to(cache.folder()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    assert _elsewhere(build.build())
    assert len(told()) == 1
    assert not list(cache.folder().rglob(".scratch-*"))


def test_no_home(tiny: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], list[str]]) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without a home
    assert _elsewhere(build.build())
    (line,) = told()
    assert "no home folder" in line
    assert not Path("~").exists()


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_a_damaged_library_is_built_again(content: bytes | None, tiny: Path) -> None:
    path = build.build()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert build.build() == path
    assert cache.sealed(path) is not None


def test_a_process_killed_while_it_builds(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one neither waits for its lock nor takes what it left."""
    log, wrapper = tmp_path / "log", tmp_path / "slow-g++"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo here >> {log}; sleep 60;; esac\n'
        f'exec {build.Toolchain.find().compiler} "$@"\n'
    )
    wrapper.chmod(0o755)
    script = (
        "import pathlib; from llm42c.codegen.cpu import build;"
        f"build.SOURCE_DIR = pathlib.Path({str(build.SOURCE_DIR)!r}); print(build.build())"
    )
    slow = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "CXX": str(wrapper)}, start_new_session=True
    )
    while not log.exists():
        assert slow.poll() is None
        time.sleep(0.05)
    os.killpg(slow.pid, signal.SIGKILL)
    slow.wait()
    assert not list(cache.folder().rglob("*.so"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=True
    )
    assert cache.sealed(Path(done.stdout.strip())) is not None
    assert done.stderr == ""


def test_an_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="expected one of avx512_bf16, avx512, avx2, portable"):
        build.build("sse2")


def test_the_instruction_set_may_be_chosen(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.chosen_isa() == build.widest_isa()
    monkeypatch.setenv("LLM42_ISA", "portable")
    assert build.chosen_isa() == "portable"
    assert "_portable_" in build.build().name
    monkeypatch.setenv("LLM42_ISA", "generic")
    with pytest.raises(build.BuildError, match="LLM42_ISA=generic: expected one of avx512_bf16, avx512"):
        build.build()


def test_one_that_the_cpu_lacks_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: "x86_64 An old one fpu sse2 avx2 f16c")
    monkeypatch.setenv("LLM42_ISA", "avx2")
    with pytest.raises(build.BuildError, match=r"cannot run avx2 kernels, it lacks fma: .*to portable"):
        build.build()
    assert build.build("portable").exists()


def test_a_process_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_loaded", ("avx2", Path("library.so")))
    assert build.load_library() == build.load_library("avx2") == build.loaded_library() == Path("library.so")
    with pytest.raises(build.BuildError, match="loaded for avx2; portable needs a process of its own"):
        build.load_library("portable")


def test_concurrent_processes_compile_once(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, wrapper = tmp_path / "log", tmp_path / "slow-g++"
    compiler = build.Toolchain.find().compiler
    note = f'case "$*" in *-o*) echo run >> {log}; sleep 1;; esac'
    wrapper.write_text(f'#!/bin/sh\n{note}\nexec {compiler} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    script = (
        "import pathlib, sys; from llm42c.codegen.cpu import build;"
        f"build.SOURCE_DIR = pathlib.Path({str(build.SOURCE_DIR)!r}); print(build.build())"
    )
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {p.communicate()[0].strip() for p in processes}
    assert [p.returncode for p in processes] == [0, 0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).exists()
    assert log.read_text().split() == ["run", "run"]  # one source, one link


def test_kernels_compile_for_an_instruction_set_that_this_machine_may_lack(tmp_path: Path) -> None:
    if "x86_64" not in build.cpu_features():
        pytest.skip("flags of x86")
    compiler = build.Toolchain.find().compiler
    flags = [*build.FLAGS, *build._ISA_FLAGS["avx512"], f"-I{build.SOURCE_DIR}", "-O0", "-c"]
    for name in ("gemm", "rowwise_norm", "rowwise_pointwise", "rowwise_softmax"):
        source = build.SOURCE_DIR / "kernels" / f"{name}.cpp"
        build._run([compiler, *flags, str(source), "-o", str(tmp_path / "out.o")])


BITS = """
import hashlib, sys, torch
from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry

registry.define()
build.load_library(sys.argv[1])
ops = torch.ops.llm42
g = torch.Generator().manual_seed(0)

def show(name, *tensors):
    for t in tensors:
        print(name, hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for m, k, n in ((1, 577, 100), (13, 300, 96)):
        x = torch.randn(m, k, generator=g)
        w = torch.randn(n, k, generator=g)
        x[:, k // 2 : k // 2 * 2], w[:, k // 2 : k // 2 * 2] = x[:, : k // 2], -w[:, : k // 2]
        x, w = x[:, torch.randperm(k, generator=g)].to(dtype), w.to(dtype)
        b, r = torch.randn(n, generator=g).to(dtype), torch.randn(m, n, generator=g).to(dtype)
        packed = ops.linear_pack(w)
        show("linear", ops.linear(x, packed, b, n), ops.linear_dense(x, w, None))
        show("unpack", ops.linear_unpack(packed, n, k))
        show("fused", ops.linear_add(x, packed, None, r, n), ops.linear_silu_mul(x, packed, n // 2))
    if dtype == torch.bfloat16:  # all bit patterns, and results near the denormals
        for k, low, high in ((6, 0, 256), (578, 56, 72)):
            x, w = (torch.randint(low << 7, high << 7, (s, k), generator=g) for s in (33, 1000))
            w += torch.randint(2, w.shape, generator=g) << 15
            x, w = (t.to(torch.uint16).view(dtype) for t in (x, w))
            show("patterns", ops.linear(x, ops.linear_pack(w), None, 1000), ops.linear_dense(-x, w, None))
    x, r = torch.randn(9, 577, generator=g).to(dtype), torch.randn(9, 577, generator=g).to(dtype)
    w = torch.randn(577, generator=g).to(dtype)
    show("norm", ops.rms_norm(x, w, 1e-5, 0.0, True), *ops.add_rms_norm(x, r, w, 1e-5, 1.0, False))
    show("norm", ops.layer_norm(x, w, r[0], 1e-5))
    show("activation", ops.silu_mul(8 * torch.cat((x, r), 1)))
    q = x[:, :576].unflatten(1, (9, 64))
    show("rotary", ops.rotary(q, r[:, :64], r[:, 64:128]))
    show("reduce", ops.row_sum(x, [-1], True), ops.row_softmax(4 * x), ops.row_log_softmax(4 * x))
"""


@pytest.mark.slow
def test_bits_are_the_same_on_every_instruction_set() -> None:
    features = set(build.cpu_features().split())
    isas = [isa for isa in build.ISAS if build.NEEDS.get(isa, set()) <= features]
    results = {}
    for isa in isas:
        command = [sys.executable, "-c", BITS, isa]
        results[isa] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = results["portable"].splitlines()
    assert len(set(lines)) == len(lines) > 50
    for isa in isas:
        assert results[isa] == results["portable"], isa


def test_the_compiler_is_found() -> None:
    found = build.Toolchain.find()
    assert shutil.which(found.compiler) == found.compiler
    assert found.version
