"""Folds one specialisation of a kernel into the text that is compiled, dumped and kept.

The files of ``kernels/`` hold ordinary Triton functions, specialised by the constants above them. Folding
decides every ``if`` that asks for decided constants only; all other text stays as it is, comments included::

    HAS_WEIGHT = tl.constexpr(True)           fold("norm", "norm", {"HAS_WEIGHT": False})

    @triton.jit                               @triton.jit
    def norm(x_ptr, y_ptr):                   def norm(x_ptr, y_ptr):
        x = tl.load(x_ptr)                        x = tl.load(x_ptr)
        if HAS_WEIGHT:                            y = x  # as it is
            y = x * 2                             tl.store(y_ptr, y)
        else:
            y = x  # as it is
        tl.store(y_ptr, y)
"""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "kernels"
_SKIP = "  # fmt: skip"
Decided = Mapping[str, bool | int | str]


class _Branch(NamedTuple):
    """What a decided ``if`` leaves: statements on lines ``first`` to ``last``, ``shift`` columns too far."""

    statements: list[ast.stmt]
    first: int
    last: int
    shift: int


def fold(
    file: str,
    function: str,
    decided: Decided | None = None,
    *,
    spelled: Mapping[str, str] | None = None,
    doc: str = "",
) -> str:
    """The text of ``function`` of ``kernels/<file>.py`` with the constants ``decided``.

    ``spelled`` writes names (the function's own, a constant's) in another way; ``doc`` is the docstring of
    the specialisation, where the function's own speaks of several. Raises ValueError for a constant that the
    file does not have, and for one that is asked for where folding cannot decide it.
    """
    text = (FOLDER / f"{file}.py").read_text()
    return fold_text(text, function, decided or {}, spelled=spelled or {}, doc=doc)


def fold_text(text: str, function: str, decided: Decided, *, spelled: Mapping[str, str], doc: str) -> str:
    """:func:`fold`, of a file's text."""
    tree = _parsed(text)
    (node,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    constants = {
        t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
    }
    if unknown := sorted(decided.keys() - constants):
        raise ValueError(f"{function} has no constant {', '.join(unknown)}")
    folder = _Folder(text.split("\n"), decided)
    first = min(node.lineno, *(n.lineno for n in node.decorator_list))
    body, start = node.body, node.body[0].lineno
    lines = list(folder.text(first, start - 1, 0))
    if doc:
        lines.append(f'    """{doc}"""')
        body, start = body[1:], (body[0].end_lineno or start) + 1
    lines += folder.block(body, start, node.end_lineno or start, 0)
    folded = _respelled("\n".join(lines), spelled)
    names = {n.id for n in ast.walk(ast.parse(folded)) if isinstance(n, ast.Name)}
    if left := sorted(names & decided.keys()):
        raise ValueError(
            f"{function}: folding leaves {', '.join(left)}, which is asked for outside of an `if`"
        )
    return folded


@functools.cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


class _Folder:
    """The lines of a file, of which blocks are folded. Numbers of lines begin with 1."""

    def __init__(self, lines: list[str], decided: Decided) -> None:
        self._lines, self._decided = lines, dict(decided)

    def text(self, first: int, last: int, shift: int) -> Iterator[str]:
        """Lines as they stand, ``shift`` columns further left."""
        for line in self._lines[first - 1 : last]:
            yield line[shift:].removesuffix(_SKIP) if line.strip() else line

    def block(self, statements: Iterable[ast.stmt], first: int, last: int, shift: int) -> Iterator[str]:
        """Lines ``first`` to ``last``, which hold ``statements``."""
        for statement in statements:
            if isinstance(statement, ast.If) and self._value(statement) is not None:
                yield from self.text(first, statement.lineno - 1, shift)
                yield from self._branch(self._taken(statement), shift)
                first = self._end(statement) + 1
            elif isinstance(statement, ast.If | ast.For | ast.While):
                for body in filter(None, (statement.body, statement.orelse)):
                    if (inner := self._elif(body)) and self._value(inner) is not None:
                        raise ValueError(f"line {inner.lineno}: a decided `elif` of an undecided `if`")
                    yield from self.text(first, body[0].lineno - 1, shift)
                    first = (body[-1].end_lineno or 0) + 1
                    yield from self.block(body, body[0].lineno, first - 1, shift)
        yield from self.text(first, last, shift)

    def _branch(self, taken: _Branch, shift: int) -> Iterator[str]:
        lines = self.block(taken.statements, taken.first, taken.last, shift + taken.shift)
        if self._elif(taken.statements):  # undecided: the chain begins here
            yield next(lines).replace("elif", "if", 1)
        yield from lines

    def _value(self, statement: ast.If) -> bool | None:
        """Whether an ``if`` takes its first branch; None if that is not decided."""
        names = {n.id for n in ast.walk(statement.test) if isinstance(n, ast.Name)}
        if not names or not names <= self._decided.keys():
            return None
        test = compile(ast.Expression(statement.test), "<test>", "eval")
        return bool(eval(test, {"__builtins__": {}}, self._decided))

    def _taken(self, statement: ast.If) -> _Branch:
        """Of a decided ``if``."""
        body, otherwise, last = statement.body, statement.orelse, self._end(statement)
        inner = self._elif(otherwise)
        after = (body[-1].end_lineno or 0) + 1
        header = inner.lineno if inner else self._header(after, "else:") if otherwise else last + 1
        if self._value(statement):
            first = self._header(statement.test.end_lineno or 0, ":") + 1
            return _Branch(body, first, header - 1, body[0].col_offset - statement.col_offset)
        if inner:
            return _Branch(otherwise, header, last, 0) if self._value(inner) is None else self._taken(inner)
        shift = otherwise[0].col_offset - statement.col_offset if otherwise else 0
        return _Branch(otherwise, header + 1, last, shift)

    def _elif(self, statements: list[ast.stmt]) -> ast.If | None:
        """The ``if`` that is written as an ``elif``."""
        if not statements or not isinstance(statements[0], ast.If):
            return None
        line = self._lines[statements[0].lineno - 1]
        return statements[0] if line.lstrip().startswith("elif") else None

    def _header(self, line: int, ending: str) -> int:
        """The line from ``line`` on whose code ends so."""
        while not self._lines[line - 1].partition("  #")[0].rstrip().endswith(ending):
            line += 1
        return line

    def _end(self, statement: ast.stmt) -> int:
        """The last line of a statement, with the comments that end its last block."""
        last = statement.end_lineno or 0
        for line in self._lines[last:]:
            inner = len(line) - len(line.lstrip()) > statement.col_offset
            if not (inner and line.lstrip().startswith("#")):
                break
            last += 1
        return last


def _respelled(text: str, spelled: Mapping[str, str]) -> str:
    """``text`` with other spellings of names; attributes are no names."""
    lines = text.split("\n")
    before = ""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and before != "." and token.string in spelled:
            found.append(token)
        before = token.string
    for token in reversed(found):
        (row, column), (_, end) = token.start, token.end
        lines[row - 1] = lines[row - 1][:column] + spelled[token.string] + lines[row - 1][end:]
    return "\n".join(lines)
