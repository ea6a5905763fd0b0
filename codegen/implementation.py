"""Digest of the sources that operators are computed by, without their comments and layout.

It is the same for every instruction set, because all of them are compiled from the same text; and it notices
an edit that forgot to raise the version of an order.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path

from llm42c.codegen import targets
from llm42c.codegen.ops.registry import implemented, operators

_ROOT = Path(__file__).parent
# A comment, or a literal that may look like the beginning of one.
_CXX = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


def implementation_of(names: Iterable[str], target: str) -> dict[str, str]:
    """What computes the operators ``names`` on ``target``: a digest a kind of source."""
    found = targets.named(target).sources()
    own = Path(inspect.getfile(type(targets.named(target)))).parent
    elsewhere = implemented(target)
    functions = [operators()[name].implementations.get(target) or elsewhere.get(name) for name in set(names)]
    files = {Path(inspect.getfile(function)) for function in functions if function}
    files |= {file for name in names for file in operators()[name].compiled_from.get(target, ())}
    files = {file for file in files if own not in file.parents}  # the others are in the target's own digest
    if files:
        found["composites"] = digest_of(files | set(_ROOT.glob("dist/*.py")))
    return found


def digest_of(paths: Iterable[Path], *further: str) -> str:
    """Of Python and C++ files, by name, and of ``further`` texts."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        strip = stripped_python if path.suffix == ".py" else stripped_cxx
        digest.update(f"{path.name}\0{strip(path.read_text())}\0".encode())
    digest.update("\0".join(further).encode())
    return digest.hexdigest()[:32]


def stripped_cxx(text: str) -> str:
    """C++ text without comments, indentation and empty lines."""
    code = _CXX.sub(lambda m: m[0] if m[0].startswith('"') else " ", text)
    lines = (" ".join(line.split()) for line in code.splitlines())  # a directive ends with its line
    return "\n".join(line for line in lines if line)


def stripped_python(text: str) -> str:
    """Python text without comments, docstrings and empty lines; the same for every version of Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())
