"""Check the direction of imports: codegen <- passes <- llm42c <- runtime, never backwards.

    python .ci/check_layers.py [ROOT]

Prints one line a violation and exits 1 if there are any. The rules:

1. A file imports only from its own layer and the layers below it.
2. Inside a function or under TYPE_CHECKING, `llm42c/__init__.py`, `llm42c/scoring.py` and `llm42c/cli/` may
   also import `llm42c.runtime`: the command line starts engines, but importing it must not.
3. Implementations of operators never import each other (`codegen/cpu`, `codegen/dist`, `codegen/triton`,
   `codegen/mlir`), and `codegen/ops` imports none of them when it is itself imported.
4. Nothing imports a package by the name of its folder (`passes.x` instead of `llm42c.passes.x`): that
   works in a checkout and nowhere else.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LAYERS = ("codegen", "passes", "llm42c", "runtime")
IMPLEMENTATIONS = ("cpu", "dist", "triton", "mlir")
PACKAGE = "llm42c"


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name."""

    module: str
    line: int
    lazy: bool  # inside a function or for type checkers only: does not run when the file is imported


def imports(path: Path, package: str) -> Iterator[Import]:
    """Every import in a file whose package is `package`, relative ones resolved."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for name in node.names:  # `from llm42c import passes` imports a module too
                yield Import(f"{base}.{name.name}", node.lineno, lazy)
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inner |= isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)


def module_name(relative: Path) -> str:
    """`passes/norm.py` -> `llm42c.passes.norm`; `llm42c/cli/__init__.py` -> `llm42c.cli`."""
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == PACKAGE else [PACKAGE, *parts])


def layer_of(module: str) -> str | None:
    """The layer of a module of this project, None for any other module."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else PACKAGE


def _implementation(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "codegen" and parts[2] in IMPLEMENTATIONS else None


def problem(module: str, found: Import) -> str | None:
    """What is wrong with `found` standing in `module`, or None."""
    if found.module.split(".")[0] in set(LAYERS) - {PACKAGE}:
        return f"imports {found.module}: say {PACKAGE}.{found.module}"
    mine, theirs = layer_of(module), layer_of(found.module)
    if mine is None or theirs is None:
        return None
    if LAYERS.index(theirs) > LAYERS.index(mine):
        may_start_engines = module in (PACKAGE, f"{PACKAGE}.scoring", f"{PACKAGE}.cli")
        may_start_engines |= module.startswith(f"{PACKAGE}.cli.")
        if not (found.lazy and theirs == "runtime" and may_start_engines):
            return f"{mine} imports {found.module}, which is {theirs}"
    target = _implementation(found.module)
    if target and _implementation(module) not in (None, target):
        return f"one implementation imports another: {found.module}"
    if target and module.startswith(f"{PACKAGE}.codegen.ops") and not found.lazy:
        return f"codegen.ops imports the implementation {found.module}"
    return None


def check(root: Path) -> list[str]:
    """All violations under `root`, as `path:line: message`."""
    out = []
    for layer in LAYERS:
        for path in sorted((root / layer).rglob("*.py")):
            relative = path.relative_to(root)
            module = module_name(relative)
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            for found in imports(path, package):
                message = problem(module, found)
                if message:
                    out.append(f"{relative}:{found.line}: {message}")
    return list(dict.fromkeys(out))


def main(root: Path) -> int:
    violations = check(root)
    print("\n".join(violations) if violations else "imports go one way")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]))
