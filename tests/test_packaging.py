"""The package as users install it: complete as a wheel, cheap to import, known to torch.compile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]


def _python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def _files(folder: str, *suffixes: str) -> set[Path]:
    found = (p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes and "__pycache__" not in p.parts)
    return {p.relative_to(ROOT) for p in found}


def test_every_folder_of_code_is_a_listed_package() -> None:
    listed = set(SETUPTOOLS["packages"])
    for package, folder in FOLDERS.items():
        for path in _files(folder, ".py"):
            inner = path.parent.relative_to(folder).parts
            assert ".".join([package, *inner]) in listed, f"{path} is in no package of pyproject.toml"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in FOLDERS.items():
        for path in _files(folder, ".py", ".cpp", ".h", ".txt", ".typed"):
            name = Path(*package.split("."), path.relative_to(folder)).as_posix()
            assert name in held, f"{path} is missing from the wheel"


def test_the_wheel_works_on_its_own(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import llm42c, llm42c.codegen.cpu.build as build, llm42c.runtime.engine, llm42c.prompts
from llm42c.passes import pipeline
assert build.sources(), "no kernels"
print(llm42c.__file__, len(llm42c.prompts.load_prompts()))
"""
    place, prompts = _python(code, PYTHONPATH=str(tmp_path)).split()
    assert Path(place).is_relative_to(tmp_path)
    assert int(prompts) >= 24


def test_torch_compile_finds_the_backend_without_an_import() -> None:
    code = """
import sys, torch
assert "llm42" in torch._dynamo.list_backends(exclude_tags=())
assert "llm42c" not in sys.modules
"""
    _python(code)


def test_import_does_nothing_but_define() -> None:
    code = """
import os, sys
before = dict(os.environ)
import llm42c, llm42c.cli, llm42c.models
assert "torch" not in sys.modules and "transformers" not in sys.modules
from llm42c import Engine, EngineConfig, Options, SamplingParams, deterministic, explain
import llm42c.backend, llm42c.runtime.loader
import torch
changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
assert changed <= {"TORCHINDUCTOR_CACHE_DIR"}, changed  # torch sets that one itself
assert not hasattr(torch.ops.llm42, "linear"), "an import registered operators"
"""
    _python(code)


def test_help_starts_without_torch() -> None:
    code = """
import sys
from llm42c.cli import main
status = main(["--help"])
assert status == 0
assert "torch" not in sys.modules
"""
    assert "demo" in _python(code)


def test_everything_is_typed() -> None:
    assert (ROOT / "llm42c" / "py.typed").is_file()
    assert "py.typed" in SETUPTOOLS["package-data"]["llm42c"]
