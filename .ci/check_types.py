"""Run mypy over the package under the names that it has once installed.

    python .ci/check_types.py [MYPY OPTIONS]

mypy names modules by their folders, and pyproject maps the folders `passes/`, `codegen/`, ... to
`llm42c.passes`, `llm42c.codegen`, .... This lays out the same mapping with symbolic links.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / ".mypy_cache" / "tree"


def lay_out(tree: Path) -> None:
    """Make `tree/llm42c`, with links to the files of the checkout; links of an earlier run are replaced."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders: dict[str, str] = setuptools["package-dir"]
    top = tree / "llm42c"
    top.mkdir(parents=True, exist_ok=True)
    for link in top.iterdir():
        link.unlink()
    for path in (ROOT / folders["llm42c"]).iterdir():
        if path.name != "__pycache__":
            (top / path.name).symlink_to(path)
    for package, folder in folders.items():
        if package != "llm42c":
            (top / package.removeprefix("llm42c.")).symlink_to(ROOT / folder)


def main(options: list[str]) -> int:
    lay_out(TREE)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "llm42c"]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
    return subprocess.run([*command, *cache, *options], cwd=TREE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
