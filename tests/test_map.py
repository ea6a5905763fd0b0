"""The map of rooms in docs/architecture.md is that of the code, and its check can say no."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def drawer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rooms_map", ROOT / ".ci" / "map.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / ".ci")
        patch.setitem(sys.modules, "rooms_map", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_rooms_of_this_project(drawer: ModuleType) -> None:
    assert drawer.main(["--check"]) == 0, "run python .ci/map.py"
    # Guard: it found imports of both kinds.
    assert {True, False} == set(drawer.arrows(ROOT).values())


@pytest.fixture
def tree(tmp_path: Path, drawer: ModuleType) -> Path:
    """Three rooms, and a page without a figure."""
    for path, text in {
        "codegen/__init__.py": '"""Ground floor:\nwhat all stand on.\n\nMore."""\n',
        "codegen/a.py": "import os, torch\n",
        "codegen/inner/__init__.py": '"""Inside, with ``code``."""\n',
        "codegen/inner/b.py": "from llm42c.codegen.a import f\nfrom . import c\n",
        "passes/__init__.py": '"""Passes."""\n',
        "passes/d.py": "def f():\n    from llm42c.codegen.inner import b\n",
        "docs/architecture.md": f"# Page\n\n{drawer.BEGIN}{drawer.END}\nThe rest.\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_rooms_arrows_and_purposes(drawer: ModuleType, tree: Path) -> None:
    assert drawer.arrows(tree) == {("codegen/inner", "codegen"): False, ("passes", "codegen/inner"): True}
    figure = drawer.figure(tree)
    assert 'codegen_inner["codegen/inner"]' in figure
    assert "    codegen_inner --> codegen\n" in figure
    assert "    passes -.-> codegen_inner\n" in figure
    assert "| `codegen` | Ground floor: what all stand on. |\n" in figure
    assert "| `codegen/inner` | Inside, with `code`. |\n" in figure


def test_an_outdated_map_is_found_and_drawn_anew(drawer: ModuleType, tree: Path) -> None:
    assert drawer.main(["--check"], tree) == 1
    assert drawer.main([], tree) == 0
    assert drawer.main(["--check"], tree) == 0
    page = (tree / drawer.PAGE).read_text()
    assert page.startswith("# Page\n")
    assert page.endswith("\nThe rest.\n")
    (tree / "passes" / "e.py").write_text("import llm42c.codegen.inner.b\n")  # dotted no more
    assert drawer.main(["--check"], tree) == 1


def test_a_room_says_what_it_is_for(drawer: ModuleType, tree: Path) -> None:
    (tree / "passes" / "__init__.py").write_text("")
    with pytest.raises(ValueError, match="passes/__init__"):
        drawer.figure(tree)


def test_a_page_without_a_place_for_the_map_is_an_error(drawer: ModuleType, tree: Path) -> None:
    (tree / drawer.PAGE).write_text("# Page\n")
    with pytest.raises(ValueError, match="no lines"):
        drawer.drawn(tree)
