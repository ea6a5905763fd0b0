"""The digest of sources: blind to comments and layout, and to nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llm42c.codegen import implementation
from llm42c.codegen.cpu import build
from llm42c.codegen.cpu import target as cpu
from llm42c.codegen.implementation import digest_of, stripped_cxx, stripped_python
from llm42c.codegen.triton import target as gpu

CXX = """\
// a comment
#pragma once
/* several
   lines */
float f(float x) { return x * 2.5f; }  // twice and a half
const char* text = "// no comment";
"""
PYTHON = '''\
"""A docstring."""

# a comment
def f(x):
    """Another,
    longer."""
    return x * 2.5  # twice and a half


TEXT = """# no comment"""
'''


def test_comments_and_layout_do_not_count() -> None:
    assert stripped_cxx(CXX).splitlines() == [
        "#pragma once",
        "float f(float x) { return x * 2.5f; }",
        'const char* text = "// no comment";',
    ]
    assert stripped_cxx(CXX) == stripped_cxx(CXX.replace("// a comment\n", "\n\n/* other */\n"))
    lines = ["def f(x):", "    return x * 2.5", 'TEXT = """# no comment"""']
    assert stripped_python(PYTHON).splitlines() == lines


@pytest.mark.parametrize(("text", "strip"), [(CXX, stripped_cxx), (PYTHON, stripped_python)])
def test_code_does(text: str, strip: object) -> None:
    for old, new in (("2.5", "2.25"), ("x *", "x +"), ("no comment", "none")):
        assert strip(text.replace(old, new)) != strip(text)  # type: ignore[operator]


def test_every_file_counts(tmp_path: Path) -> None:
    one, other = tmp_path / "a.cpp", tmp_path / "b.h"
    one.write_text(CXX)
    other.write_text(CXX)
    digests = {digest_of([one]), digest_of([one, other]), digest_of([one, other], "-O3")}
    other.write_text(CXX.replace("2.5", "2.25"))
    digests.add(digest_of([one, other]))
    assert len(digests) == 4


def test_an_edited_kernel_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One constant of one kernel; the same for a flag that all instruction sets share."""
    for path in build.all_sources():
        copy = tmp_path / path.relative_to(build.SOURCE_DIR)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    before = cpu.kernels_digest()
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    digest = cpu.kernels_digest.__wrapped__
    assert digest() == before
    gemm = tmp_path / "kernels" / "gemm.cpp"
    gemm.write_text("// more to say\n" + gemm.read_text())
    assert digest() == before
    norm = tmp_path / "kernels" / "rowwise_norm.cpp"
    text = norm.read_text()
    assert "+ p.eps" in text
    norm.write_text(text.replace("+ p.eps", "+ 2 * p.eps"))
    assert digest() != before
    norm.write_text(text)
    assert digest() == before
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-ffast-math"])
    assert digest() != before


def test_an_edited_gpu_kernel_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(gpu._HERE, tmp_path / "triton")
    monkeypatch.setattr(gpu, "_HERE", tmp_path / "triton")
    digest = gpu.emitters_digest.__wrapped__
    assert digest() == gpu.emitters_digest()
    norm = tmp_path / "triton" / "kernels" / "norm.py"
    text = norm.read_text()
    norm.write_text("# more to say\n" + text)
    assert digest() == gpu.emitters_digest()
    assert "+ eps)" in text
    norm.write_text(text.replace("+ eps)", "+ 2 * eps)"))
    assert digest() != gpu.emitters_digest()


def test_operators_in_python_count_where_they_are_called() -> None:
    plain = implementation.implementation_of(["linear", "rms_norm"], "cpu")
    assert plain.keys() == {"kernels"}
    ranks = implementation.implementation_of(["linear", "all_reduce"], "cpu")
    assert ranks.keys() == {"kernels", "composites"}
    assert ranks["kernels"] == plain["kernels"]
    assert implementation.implementation_of(["linear"], "cuda").keys() == {"emitters"}
