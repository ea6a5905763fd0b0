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
PACKAGE = ROOT / "llm42c"
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
# Each is a folder at the top of the tree, and a link to it in llm42c/.
LINKS = ("passes", "codegen", "runtime")
FOLDERS = {"llm42c": Path("llm42c"), **{link: Path("llm42c", link) for link in LINKS}}


def _python(code: str, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
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


def test_each_link_is_a_top_level_folder() -> None:
    for folder in LINKS:
        link = PACKAGE / folder
        assert not Path(os.readlink(link)).is_absolute(), f"{link} holds only on this machine"
        assert link.resolve() == (ROOT / folder).resolve(), f"{link} is not {folder}/"
    linked = {path.name for path in PACKAGE.iterdir() if path.is_symlink()}
    assert linked == set(LINKS), "a link that no test knows, or one that is missing"


def test_every_folder_of_code_is_a_package() -> None:
    for folder in {path.parent for top in FOLDERS for path in _files(top, ".py")}:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} is in no package"


def test_no_module_has_two_names() -> None:
    """Whichever name it is imported by: that of the folder and that of the link are not mixed."""
    code = """
import collections, importlib, pkgutil, sys
from pathlib import Path
import llm42c
names = [m.name for m in pkgutil.walk_packages(llm42c.__path__, "llm42c.")]
assert {f"llm42c.{link}" for link in sys.argv[1:]} <= set(names), names
optional = ("triton", "gguf", "accelerate", "matplotlib")
optional += ("fastapi", "starlette", "uvicorn", "prometheus_client")
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert (error.name or "").split(".")[0] in optional, error
files = collections.defaultdict(set)
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file:
        files[Path(file).resolve()].add(name)
ours = {file: names for file, names in files.items() if any(n.startswith("llm42c") for n in names)}
print(len(ours), [sorted(names) for names in ours.values() if len(names) > 1])
"""
    count, twice = _python(code, *LINKS).split(maxsplit=1)
    assert int(count) > 150
    assert twice == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "llm42c", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in FOLDERS.items():
        for path in _files(folder, ".py", ".cpp", ".h", ".txt", ".typed"):
            name = (package / path.relative_to(folder)).as_posix()
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
import llm42c, llm42c.cli, llm42c.hub.models
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
