"""Kernels as Triton functions: what folding decides, what it leaves, and that it changes no bit."""

from __future__ import annotations

import ast
import builtins
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from llm42c.codegen.triton import catalog, devices
from llm42c.codegen.triton.fold import fold_text

HERE = Path(__file__).parent
CONSTANTS = """
A = tl.constexpr(True)
B = tl.constexpr(True)
MODE = tl.constexpr("one")
"""


def folded(body: str, doc: str = "", spelled: dict[str, str] | None = None, **decided: Any) -> str:
    """The folded body of a function."""
    text = CONSTANTS + "\n\n@triton.jit\ndef f(x_ptr):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    header, name, out = fold_text(text, "f", decided, spelled=spelled or {}, doc=doc).split("\n", 2)
    assert (header, name) == ("@triton.jit", "def f(x_ptr):")
    return textwrap.dedent(out).strip("\n")


CHAIN = """
x = 1
# about the choice
if A:
    # of A
    x = 2

    y = 3  # a blank line above
    # after
elif B:
    x = 4
else:
    # of neither
    x = 5
    # at the end
z = x
"""


@pytest.mark.parametrize(
    ("decided", "want"),
    [
        (
            {"A": True},
            "x = 1\n# about the choice\n# of A\nx = 2\n\ny = 3  # a blank line above\n# after\nz = x",
        ),
        ({"A": False, "B": True}, "x = 1\n# about the choice\nx = 4\nz = x"),
        ({"A": False, "B": False}, "x = 1\n# about the choice\n# of neither\nx = 5\n# at the end\nz = x"),
    ],
)
def test_the_branch_that_is_taken_keeps_its_text(decided: dict[str, bool], want: str) -> None:
    assert folded(CHAIN, **decided) == want


def test_a_branch_that_nobody_takes_leaves_nothing() -> None:
    assert folded("x = 1\nif A:\n    x = 2\n    # of A\n\nz = x", A=False) == "x = 1\n\nz = x"


def test_an_undecided_if_stays_and_its_blocks_are_folded() -> None:
    body = """
    for i in range(3):
        if x > 0:
            if A:
                y = 1
            else:
                y = 2
        elif x < 0:
            if not A:
                y = 3
            y = 4
    """
    want = "for i in range(3):\n    if x > 0:\n        y = 1\n    elif x < 0:\n        y = 4"
    assert folded(body, A=True) == want
    assert folded("if A:\n    y = 1\nelif x > 0:\n    y = 2\nelse:\n    y = 3", A=False) == (
        "if x > 0:\n    y = 2\nelse:\n    y = 3"
    )


def test_nested_decisions_move_to_the_left() -> None:
    body = """
    if A:
        if B:
            y = (
                1
            )
        for i in range(2):
            if not B:
                y = 2
            y = 3
    """
    assert folded(body, A=True, B=True) == "y = (\n    1\n)\nfor i in range(2):\n    y = 3"


def test_tests_are_expressions_of_constants() -> None:
    body = 'if MODE == "two" or (\n    A\n    and not B\n):  # why\n    y = 1\nelse:  # why not\n    y = 2\n'
    assert folded(body, MODE="two", A=False, B=False) == "y = 1"
    assert folded(body, MODE="one", A=True, B=True) == "y = 2"


def test_a_docstring_and_names_are_those_of_the_specialisation() -> None:
    body = '"""Of\n\nseveral."""\nx = DTYPE(x.DTYPE)  # DTYPE\ny = g(x)'
    want = '"""Of one."""\nx = tl.float32(x.DTYPE)  # DTYPE\ny = other(x)'
    assert folded(body, "Of one.", {"DTYPE": "tl.float32", "g": "other"}) == want


def test_marks_for_the_formatter_do_not_appear() -> None:
    assert folded("y = f(\n    1, 2,\n)  # fmt: skip\nz = 1") == "y = f(\n    1, 2,\n)\nz = 1"


@pytest.mark.parametrize(
    ("body", "decided", "message"),
    [
        ("y = 1", {"WRONG": 1}, "no constant WRONG"),
        ("y = 1 if A else 2", {"A": True}, "leaves A"),
        ("if A and x > 0:\n    y = 1", {"A": True}, "leaves A"),
        ("if x > 0:\n    y = 1\nelif A:\n    y = 2", {"A": True}, "a decided `elif` of an undecided"),
    ],
)
def test_what_cannot_be_decided_is_an_error(body: str, decided: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folded(body, **decided)


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "AMD Instinct MI300X"])
def test_no_kernel_asks_for_a_name_that_its_text_lacks(name: str) -> None:
    kernels = list(catalog.kernels(devices.from_table(name)))
    assert len(kernels) > 20
    for kernel in kernels:
        tree = ast.parse(kernel.source)
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
        bound = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        bound |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} | set(dir(builtins))
        bound |= {
            a.asname or a.name
            for n in tree.body
            if isinstance(n, ast.Import | ast.ImportFrom)
            for a in n.names
        }
        bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        assert {n.id for n in names} <= bound, kernel.label


def test_files_of_kernels_are_imported_by_nobody() -> None:
    code = """
import sys
from llm42c.codegen.ops import registry
from llm42c.codegen.triton import catalog
assert registry.implemented("cuda")
print([name for name in sys.modules if ".triton.kernels." in name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(HERE / "interpreted_folds.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# Different results that the specialisations have. Of norms: a rounding before the weight without a weight is
# none, and a kernel without residual leaves the total alone. Of products: the layout of a weight is not seen.
@pytest.mark.parametrize(("kernels", "different"), [("norm", 24), ("linear", 2), ("rows", 4)])
def test_folded_kernels_have_the_bits_of_their_files(
    interpreted: dict[str, Any], kernels: str, different: int
) -> None:
    assert interpreted[kernels] == {"same": True, "different": different}
