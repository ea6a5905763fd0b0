"""Imports go one way, and the check that says so can say no."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def _checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_layers", ROOT / ".ci" / "check_layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_layers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


checker = _checker()


def test_this_project_keeps_the_direction() -> None:
    assert checker.check(ROOT) == []
    # Vacuity guard: it did look at imports, upward ones of the command line among them.
    lazy = [i for i in checker.imports(ROOT / "llm42c/cli/common.py", "llm42c.cli") if i.lazy]
    assert any(i.module.startswith("llm42c.runtime") for i in lazy)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("codegen/a.py", "from llm42c.passes import graph\n", "codegen imports llm42c.passes.graph"),
        ("codegen/a.py", "import llm42c.errors\n", "codegen imports llm42c.errors"),
        ("codegen/a.py", "def f():\n    import llm42c.runtime.engine\n", "which is runtime"),
        ("codegen/ops/a.py", "from ...runtime import engine\n", "codegen imports llm42c.runtime.engine"),
        ("passes/a.py", "from llm42c import errors\n", "passes imports llm42c.errors"),
        ("passes/a.py", "if TYPE_CHECKING:\n    import llm42c.runtime\n", "which is runtime"),
        ("llm42c/a.py", "def f():\n    from llm42c.runtime import engine\n", "which is runtime"),
        ("llm42c/cli/a.py", "from llm42c.runtime import engine\n", "which is runtime"),
        ("runtime/a.py", "from passes import graph\n", "say llm42c.passes.graph"),
        ("codegen/cpu/a.py", "import llm42c.codegen.triton.x\n", "one implementation imports another"),
        ("codegen/triton/a.py", "def f():\n    from llm42c.codegen import cpu\n", "one implementation"),
        ("codegen/ops/a.py", "from llm42c.codegen.cpu import build\n", "imports the implementation"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, path: str, text: str, message: str) -> None:
    _write(tmp_path, path, text)
    (violation,) = checker.check(tmp_path)
    assert violation.startswith(f"{path}:")
    assert message in violation
    assert checker.main(tmp_path) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("passes/a.py", "from llm42c.codegen.ops import registry\n"),
        ("llm42c/cli/a.py", "def f():\n    from llm42c.runtime import engine\n"),
        ("llm42c/cli/a.py", "if TYPE_CHECKING:\n    from llm42c.runtime.engine import Engine\n"),
        ("codegen/ops/a.py", "def f():\n    from llm42c.codegen.cpu import build\n"),
        ("codegen/cpu/a.py", "from . import build\n"),
        ("runtime/a.py", "import torch\nfrom llm42c.codegen.cpu import build\n"),
    ],
)
def test_the_right_direction_is_let_through(tmp_path: Path, path: str, text: str) -> None:
    _write(tmp_path, path, text)
    assert checker.check(tmp_path) == []


def _write(root: Path, path: str, text: str) -> None:
    target = root / path
    target.parent.mkdir(parents=True)
    target.write_text(text)
