"""The cache of emitted kernels: its keys, damaged files, several writers, and no folder at all."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
from pathlib import Path

import pytest

from llm42c.codegen import cache as folders
from llm42c.codegen.triton import devices, kernel, silu_mul
from llm42c.codegen.triton.catalog import Kernel

pytest.importorskip("triton")
H200, A100 = devices.from_table("NVIDIA H200"), devices.from_table("NVIDIA A100-SXM4-80GB")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel.cache_dir().is_relative_to(tmp_path)
    return kernel.cache_dir()


def files(folder: Path, suffix: str = ".py") -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


def test_one_file_for_a_text_and_a_target(cache: Path):
    source = silu_mul.emit()
    first = kernel.load("silu_mul", source, H200)
    assert kernel.load("silu_mul", source, H200) is first
    assert len(files(cache)) == 1
    assert files(cache)[0].read_text() == source
    kernel.load("silu_mul", source, A100)
    kernel.load("silu_mul", source + "# another\n", H200)
    assert len(files(cache)) == 3


def test_measured_rates_do_not_change_the_key():
    faster = H200.measured({"memory_bandwidth": devices.Value(4e12, "measured: test")})
    source = silu_mul.emit()
    assert kernel.cache_key(source, faster.hash) == kernel.cache_key(source, H200.hash)


def test_versions_and_options_are_in_the_key(monkeypatch: pytest.MonkeyPatch):
    source = silu_mul.emit()
    before = kernel.cache_key(source, H200.hash, {"num_warps": 4})
    assert kernel.cache_key(source, H200.hash, {"num_warps": 8}) != before
    monkeypatch.setattr(kernel, "versions", lambda: {"triton": "0"})
    assert kernel.cache_key(source, H200.hash, {"num_warps": 4}) != before


def test_a_damaged_file_is_written_again(cache: Path):
    source = silu_mul.emit()
    kernel.load("silu_mul", source, H200)
    path = files(cache)[0]
    path.write_text("this is no kernel (")
    importlib.invalidate_caches()
    kernel._load.cache_clear()
    assert kernel.load("silu_mul", source, H200).__name__ == "silu_mul"
    assert path.read_text() == source


def test_many_writers_leave_one_whole_file(cache: Path):
    text = "x" * 200_000
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda _: folders.write(cache / "same.py", text), range(32)))
    assert all(written)
    assert [p.name for p in cache.iterdir()] == ["same.py"]
    assert (cache / "same.py").read_text() == text


def test_without_a_cache_folder_kernels_come_from_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert kernel.load("silu_mul", silu_mul.emit(), A100).__name__ == "silu_mul"


def test_what_was_compiled_once_is_not_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = Kernel("silu_mul", "silu_mul", silu_mul.emit(), "bfloat16")
    first = wanted.compile(H200)
    assert first.resources.registers > 0
    monkeypatch.setattr(kernel, "_compile", lambda *_: pytest.fail("compiled again"))
    assert wanted.compile(H200) == first
    # Control: another launch is another kernel; a damaged file is not believed.
    with pytest.raises(pytest.fail.Exception):
        dataclasses.replace(wanted, warps=8).compile(H200)
    (found,) = files(cache, ".json")
    found.write_text(found.read_text()[:-20])
    with pytest.raises(pytest.fail.Exception):
        wanted.compile(H200)


def test_a_variant_is_taken_when_the_first_one_spills(monkeypatch: pytest.MonkeyPatch):
    spills = {"many": 40, "few": 8, "none": 0}
    compiled: list[str] = []

    def pretend(kernel_: Kernel, target: devices.Device) -> kernel.Compiled:
        compiled.append(kernel_.label)
        used = kernel.Resources(10, spills[kernel_.label], 0, 4)
        return kernel.Compiled(kernel_.label, target, used, {})

    monkeypatch.setattr(Kernel, "_compile", pretend)
    many, few, none = (Kernel(label, "", "", "bfloat16") for label in spills)
    assert dataclasses.replace(many, variants=(few, none)).compile(H200).name == "none"
    assert dataclasses.replace(many, variants=(few,)).compile(H200).name == "few"
    compiled.clear()
    assert dataclasses.replace(none, variants=(many,)).compile(H200).name == "none"
    assert compiled == ["none"]
