"""What Inductor would compile, on a machine without a C++ compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx

from llm42c.codegen.cpu import build
from llm42c.compile import inductor


@pytest.fixture
def graph() -> fx.GraphModule:
    return fx.symbolic_trace(lambda x: (x.neg(),))


def test_a_graph_runs_as_it_stands(
    graph: fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert build.compiler_version() == build.NO_COMPILER
    for compile_module in (inductor.compile_fixed, inductor.compile_free):
        assert compile_module(graph, [torch.ones(3)]) is graph
    assert inductor.WITHOUT_COMPILER in inductor.notes()


def test_with_a_compiler_nothing_is_left_to_pytorch() -> None:
    assert not inductor.runs_as_it_stands([torch.ones(3)])
    assert inductor.WITHOUT_COMPILER not in inductor.notes()


def test_devices_for_which_inductor_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert not inductor.runs_as_it_stands([torch.ones(3, device="meta")])
