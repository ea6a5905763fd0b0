"""The list of passes: documented, ordered, and each pass a function of the graph alone."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch
from graphs import capture, run

from llm42c.passes import graph as g
from llm42c.passes import pipeline
from llm42c.passes.base import PACKED, PLAIN, Context, Pass

README = (Path(pipeline.__file__).parent / "README.md").read_text()


@pytest.mark.parametrize("name", sorted({p.name for p in pipeline.PASSES}))
def test_each_pass_says_what_it_does(name):
    step = next(p for p in pipeline.PASSES if p.name == name)
    doc = sys.modules[step.apply.__module__].__doc__ or ""
    assert "Cases" in doc
    assert "1. " in doc
    if name not in ("check", "dead_code", "common_subexpressions"):
        assert "Before and after" in doc
    assert f"`{name}`" in README
    assert list(inspect.signature(step.apply).parameters) == ["graph", "ctx", "report"]


def test_the_check_comes_last():
    for target in (PLAIN, PACKED):
        assert pipeline.passes_for(target)[-1].name == "check"
        assert [p.name for p in pipeline.passes_for(target)[:2]] == ["collectives", "normalize"]


def _block(x, w):
    h = x + torch.nn.functional.linear(x, w)
    return torch.softmax(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5), -1)


def test_report_and_observer():
    gm = capture(_block, torch.randn(3, 16), torch.randn(16, 16))
    seen = []
    report = pipeline.run(gm, Context(), lambda name, graph: seen.append((name, len(graph.nodes))))
    assert seen[0][0] == "00_input"
    assert {name.split("_", 1)[1] for name, _ in seen} >= {"linear", "rms_norm", "reductions"}
    assert len(report["linear"].matches) == 1
    assert report.seconds > 0
    table = report.table()
    assert "add_rms_norm" in table
    assert not report.unplaced
    run(gm)


def test_a_pass_that_bakes_a_size_is_caught(monkeypatch):
    """In a packed graph a size must stay a size."""

    def bad(graph, ctx, report):
        node = next(n for n in graph.nodes if g.name(n) == "reshape")
        node.args = (node.args[0], tuple(g.fake(node).shape))

    gm = capture(lambda x: x.reshape(x.shape[1], x.shape[0]), torch.randn(5, 6), dynamic=True)
    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES[:1], Pass("bad", bad)))
    with pytest.raises(g.IllegalRewriteError, match="written into"):
        pipeline.run(gm, Context(target=PACKED))
