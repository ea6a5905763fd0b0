"""CONTRIBUTING and the map are true: what they name is there, and their recipes are what tests follow."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/compile.md", "passes/README.md")
OF_FILES = [page for page in PAGES if page != "docs/compile.md"]  # which names files that a user will find
_ENDINGS = (".py", ".md", ".h", ".cpp", ".csv", ".toml")
_NUMBERS = {"one": 1, "two": 2, "three": 3}


def tracked() -> list[str]:
    """Files of the tree, and those not yet committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        folders = ("codegen", "passes", "llm42c", "runtime", "tests", "docs", "benchmarks", "examples", ".ci")
        paths = [p for folder in folders for p in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
        found = "\n".join(p.relative_to(ROOT).as_posix() for p in paths)
    return found.splitlines()


def named(page: str) -> set[str]:
    """What a page names in backticks or as a link, if it is a file or folder; a part in <> is ``*``."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    words = {word for code in re.findall(r"`([^`\n]+)`", page) for word in code.split()}
    paths = set()
    for word in words:
        word = re.sub(r"<\w+>", "*", word.strip(",;:()"))
        if re.fullmatch(r"[\w.*/-]+", word) and (word.endswith((*_ENDINGS, "/")) or word.startswith(".ci/")):
            paths.add(word)
    return paths


def missing(page: str, files: list[str]) -> set[str]:
    """Of what the page names: no file, nor the end of a file's path, nor a folder."""
    folders = {"/".join(f.split("/")[:n]) + "/" for f in files for n in range(1, f.count("/") + 1)}
    there = [*files, *folders]

    def exists(path: str) -> bool:
        return any(fnmatch.fnmatch(one, path) or fnmatch.fnmatch(one, f"*/{path}") for one in there)

    return {path for path in named(page) if not exists(path)}


@pytest.mark.parametrize("name", OF_FILES)
def test_what_a_page_names_is_there(name: str) -> None:
    lost = missing((ROOT / name).read_text(), tracked())
    assert [path for path in lost if not (ROOT / path).exists()] == []  # through the links of llm42c/


def test_the_pages_name_something() -> None:
    """Guard, and control."""
    assert len(named((ROOT / "CONTRIBUTING.md").read_text())) > 20
    assert len(named((ROOT / "docs/architecture.md").read_text())) > 50
    page = "See `passes/<name>.py`, `passes/gone.py`, `codegen/<target>/there.py` and `bind_*.h`."
    assert missing(page, ["passes/a.py", "codegen/cpu/bind_a.h"]) == {"passes/gone.py", "codegen/*/there.py"}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file) if file else page
        assert other.exists(), target
        headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE) if other.is_file() else []
        anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
        assert not anchor or anchor in anchors, target


def test_modules_and_names_are_there() -> None:
    """``llm42c.passes.base.Pass``, and the same without its first part."""
    found = 0
    for name in PAGES:
        page = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
        for dotted in re.findall(r"`((?:llm42c|codegen|passes|runtime)(?:\.\w+)+)`", page):
            if dotted.endswith((".py", ".passes")):  # a file, or the group of entry points
                continue
            module, _, attribute = dotted.removeprefix("llm42c.").rpartition(".")
            owner = importlib.import_module(f"llm42c.{module}" if module else "llm42c")
            assert hasattr(owner, attribute) or importlib.import_module(f"{owner.__name__}.{attribute}")
            found += 1
    assert found > 3


# -- recipes -------------------------------------------------------------------------------------------------


def recipe(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def files_of(test: str) -> dict[str, str]:
    """The literal ``FILES`` of a test that follows a recipe."""
    for statement in ast.parse((ROOT / test).read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "FILES":
            found: dict[str, Any] = ast.literal_eval(statement.value)
            return found
    raise AssertionError(f"{test} has no FILES")


def test_the_recipe_for_an_operator_is_the_one_that_is_tried() -> None:
    text = recipe("Add an operator")
    test, count = re.findall(r"`(tests/\S+)` does that with (\w+) files", text)[0]
    files = files_of(test)
    assert len(files) == _NUMBERS[count]
    source = "\n".join(files.values())
    for part in ("@operator", "@implements(", "examples=", "kernels=", "simulator("):
        assert part in text, f"the recipe does not speak of {part}"
        assert part in source, f"{test} does not try {part}"
    for part in ('.compiled("cpu", ', "TORCH_LIBRARY_IMPL(llm42, CPU, m)"):
        assert part in text
        assert part in (ROOT / test).read_text()
    # In the tree it is as many: a declaration and an implementation a target.
    places = ["codegen/ops/<name>.py", "codegen/cpu/kernels/", "codegen/triton/kernels/"]
    assert [p for p in places if f"`{p}`" in text] == places


def test_the_recipe_for_a_target_is_the_one_that_is_tried() -> None:
    text = recipe("Add a target")
    test, count = re.findall(r"`(tests/\S+)` does that with (\w+) files", text)[0]
    files = files_of(test)
    assert len(files) == _NUMBERS[count]
    assert len({name.partition("/")[0] for name in files}) == 1, "more than a folder"
    assert any(name.endswith("/target.py") and "TARGET = " in file for name, file in files.items())
    source = "\n".join(files.values())
    for part in ("@implements(", "packing", "codegen.targets"):
        assert part in text, f"the recipe does not speak of {part}"
        assert part in source, f"{test} does not try {part}"
    assert "targets.add(TARGET)" in (ROOT / test).read_text()


def test_the_recipe_for_a_pass_is_the_one_that_is_tried() -> None:
    text = recipe("Add a pass")
    (test,) = re.findall(r"`(tests/llm42c/\S+)`", text)
    files = files_of(test)
    (count,) = re.findall(r"It is (\w+) file", text)
    assert [name for name in files if name.endswith(".py")] == ["far_pass.py"]
    assert _NUMBERS[count] == 1
    assert "functools.partial" in text
    assert "functools.partial" in files["far_pass.py"]
    group = "llm42c.passes"
    assert f'[project.entry-points."{group}"]' in text
    assert any(f"[{group}]" in file for file in files.values())
