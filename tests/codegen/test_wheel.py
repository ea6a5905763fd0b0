"""The wheel that carries the kernels, in an environment of its own on a machine without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import torch

from llm42c.codegen.cpu import build

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    command += ["--no-build-isolation", "-w", str(folder), "--config-settings=--build-option=--with-kernels"]
    subprocess.run([*command, str(ROOT)], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with nothing but the wheel in it, and what it needs."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    (site / "needed.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder / "bin" / "python"


def _run(python: Path, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """There is no compiler, and nothing of this checkout but the script."""
    empty = python.parent.parent / "empty"
    empty.mkdir(exist_ok=True)
    env = os.environ | {"PATH": str(empty), "CXX": str(empty / "none"), "XDG_CACHE_HOME": str(empty)} | env
    env.pop("PYTHONPATH", None)
    command = [str(python), str(ROOT / "tests" / script), *arguments]
    return subprocess.run(command, env=env, cwd=empty, capture_output=True, text=True, check=False)


def _json(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("\n{") if "\n{" in done.stdout else 0 :])


def test_one_wheel_for_every_python_holds_a_library_for_each_instruction_set(wheel: Path) -> None:
    assert "-py3-none-linux_" in wheel.name
    names = [Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert sorted(names) == sorted(map(build.carried_name, build.ISAS))


def test_the_wheel_carries_every_file_that_is_no_code(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("runtime/server/page", "llm42c/prompts"):
        files = [
            path
            for path in (ROOT / folder).iterdir()
            if path.suffix not in (".py", ".pyc") and path.is_file()
        ]
        assert files
        for path in files:
            name = path.relative_to(ROOT).as_posix()
            assert (name if name.startswith("llm42c/") else f"llm42c/{name}") in inside


def test_each_library_gives_the_bits_of_the_compiled_kernels(python: Path) -> None:
    compiled = subprocess.run(
        [sys.executable, str(ROOT / "tests/codegen/order_bits.py"), "portable"],
        capture_output=True,
        text=True,
    )
    features = set(build.cpu_features().split())
    able = [isa for isa in build.ISAS if build.NEEDS.get(isa, set()) <= features]
    assert "portable" in able
    for isa in able:
        assert _json(_run(python, "codegen/order_bits.py", isa)) == _json(compiled)


def test_an_instruction_set_that_the_cpu_lacks_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: "x86_64 An old one fpu sse2")
    with pytest.raises(build.BuildError, match=r"^this CPU cannot run avx2 kernels, it lacks [^\n]*$"):
        build.build("avx2")


def test_a_model_needs_no_compiler_and_has_the_same_bits(python: Path, tmp_path: Path) -> None:
    model = str(tiny_folder.save_letters(tmp_path / "model"))
    here = subprocess.run(
        [sys.executable, str(ROOT / "tests/runtime/isa_demo.py"), model, "2"], capture_output=True, text=True
    )
    done = _run(python, "runtime/isa_demo.py", model, "2")
    assert done.returncode == 0, done.stderr
    (carried,), (compiled,) = (json.loads(run.stdout.splitlines()[-1]) for run in (done, here))
    assert carried["tokens"] == compiled["tokens"]
    assert carried["logprobs"] == compiled["logprobs"]
