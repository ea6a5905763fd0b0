"""The list of passes: documented, ordered, and each pass a function of the graph alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from graphs import capture, run

from llm42c.passes import graph as g
from llm42c.passes import pipeline
from llm42c.passes.base import PACKED, PLAIN, Context, Pass, PassReport

README = (Path(pipeline.__file__).parent / "README.md").read_text()


def test_the_table_of_passes_is_the_list():
    """Each row of the README's table names its passes and the graphs that they run on, in order."""
    rows = re.findall(r"^\| (`[^|]+`) \|([✓ ]*)\|([✓ ]*)\|", README, re.MULTILINE)
    table = {
        name: {t for t, mark in ((PLAIN, plain), (PACKED, packed)) if mark.strip()}
        for names, plain, packed in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    passes: dict[str, set[str]] = {}
    for step in (*pipeline.PASSES, *pipeline.ON_REQUEST):
        passes.setdefault(step.name, set()).update(step.targets & {PLAIN, PACKED})
    assert {n: t for n, t in table.items() if passes.get(n) != t} == {}
    assert passes.keys() == table.keys()


@pytest.mark.parametrize("name", sorted({p.name for p in pipeline.PASSES}))
def test_a_graph_without_its_pattern_is_left_as_it_was(name):
    step = next(p for p in pipeline.PASSES if p.name == name)
    for target in step.targets:
        gm = capture(lambda x: x.sin() - x.cos(), torch.randn(3, 5))
        before, report = str(gm.graph), PassReport(name)
        step.apply(gm.graph, Context(target=target), report)
        assert (str(gm.graph) == before) or name == "normalize"
        assert not report.matches or name == "normalize"


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
