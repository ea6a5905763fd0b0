"""CONTRIBUTING's recipe for a pass of another package: a file in a folder, named by option or entry point."""

from __future__ import annotations

import functools
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, fx

import llm42c
from llm42c.compile.added_passes import find_passes
from llm42c.compile.compiler import ModelCompiler
from llm42c.errors import OptionsError, UnsupportedModelError
from llm42c.inspect.explanation import explain_engine
from llm42c.options import Options
from llm42c.passes import graph as g
from llm42c.passes import pipeline
from llm42c.passes.base import PACKED, PLAIN, Context, Pass, PassReport

FILES = {
    "far_pass.py": '''
        """Norms get an eps of at least ``least``."""

        import functools

        import torch

        from llm42c.passes import graph as g
        from llm42c.passes.base import Pass


        def larger_eps(graph, ctx, report, *, least):
            for node in list(graph.nodes):
                if node.target is not torch.ops.llm42.rms_norm.default:
                    continue
                x, weight, eps, *rest = node.args
                if eps >= least:
                    report.miss(node, f"its eps is {least} or more")
                    continue
                report.match(node)
                g.replace(node, g.insert(node, node.target, (x, weight, least, *rest), like=node))


        LARGER_EPS = Pass("larger_eps", functools.partial(larger_eps, least=1e-2), before="add_rms_norm")
    ''',
    "far-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: far\nVersion: 0.1\n",
    "far-0.1.dist-info/entry_points.txt": "[llm42c.passes]\nlarger_eps = far_pass:LARGER_EPS\n",
}
X = 0.1 * torch.randn(5, 24, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that offers a pass; nobody has imported it."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "far_pass", sys)  # restored afterwards to what it was: nothing
    monkeypatch.delitem(sys.modules, "far_pass")
    return tmp_path


def norms(first: float) -> Callable[[Tensor], Tensor]:
    """Two norms, the second with an eps that is large enough."""

    def fn(x: Tensor) -> Tensor:
        for eps in (first, 0.5):
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return x

    return fn


def compiled(fn: Callable[..., Any], **options: Any) -> Tensor:
    torch._dynamo.reset()
    result: Tensor = torch.compile(fn, backend="llm42", options=options)(X)
    return result


@pytest.mark.parametrize("name", ["far_pass:LARGER_EPS", "larger_eps"])
def test_it_matches_declines_and_is_explained(far: Path, name: str) -> None:
    """By its place, and by its entry point."""
    page = llm42c.explain(norms(1e-6), X, {"passes": [name]})
    report = page.graphs[0].report["larger_eps"]
    assert len(report.matches) == 1
    assert list(report.reasons()) == ["its eps is 0.01 or more"]
    uuid = find_passes([name])[0].uuid
    assert f"added: far_pass, before add_rms_norm, uuid {uuid}" in str(page)
    assert "not 1×: its eps is 0.01 or more" in str(page)
    order = [p.name for p in page.graphs[0].report.passes]
    assert order.index("larger_eps") == order.index("add_rms_norm") - 1
    assert order[-1] == "check"


def test_its_effect_is_in_the_bits(far: Path) -> None:
    changed = compiled(norms(1e-6), passes=["larger_eps"])
    assert torch.equal(changed, compiled(norms(1e-2)))
    assert not torch.equal(changed, compiled(norms(1e-6)))  # Guard: these inputs tell.


def test_it_is_dumped(far: Path, tmp_path: Path) -> None:
    compiled(norms(1e-6), passes=["larger_eps"], dump=str(tmp_path / "dump"))
    (folder,) = (tmp_path / "dump").iterdir()
    (after,) = folder.glob("*_larger_eps.txt")
    assert re.search(r"rms_norm\(.*, 0\.01, ", after.read_text())
    assert re.search(r"added: far_pass, .* uuid \w{32}", (folder / "report.txt").read_text())


def test_nobody_runs_it_unasked(far: Path) -> None:
    page = llm42c.explain(norms(1e-6), X)
    assert "larger_eps" not in [p.name for p in page.graphs[0].report.passes]
    assert "far_pass" not in sys.modules


def test_the_graph_s_digest_covers_its_effect(far: Path) -> None:
    """The contract has that digest (tests/runtime/test_contract_bits.py)."""

    def compiler(*passes: Pass) -> ModelCompiler:
        return ModelCompiler(tiny.model("llama"), keep_originals=True, passes=passes)

    def digest(*passes: Pass) -> str:
        return compiler(*passes).compile().computation.graph

    (larger,) = find_passes(["larger_eps"])
    assert isinstance(larger.apply, functools.partial)
    idle = Pass("larger_eps", functools.partial(larger.apply.func, least=0.0), before="add_rms_norm")
    assert digest(larger) != digest()
    assert digest(idle) == digest()  # what changes nothing is no other computation
    page = explain_engine(compiler(larger))
    assert page.report["larger_eps"].matches
    assert "added: far_pass" in str(page)


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        (["far_pass:NOTHING"], "cannot be loaded: AttributeError"),
        (["no_such_package:P"], "cannot be loaded: ModuleNotFoundError"),
        ([":P"], "cannot be loaded"),
        (["larger_epz"], "did you mean 'larger_eps'.*entry points llm42c.passes: larger_eps"),
        (["far_pass:larger_eps"], "is function, not a llm42c.passes.base.Pass"),
        (["larger_eps", "far_pass:LARGER_EPS"], "name of another pass"),
        ("larger_eps", "must be a list"),
        (3, "must be a list"),
        ([3], "is int"),
    ],
)
def test_bad_names_are_one_line(far: Path, passes: Any, reason: str) -> None:
    with pytest.raises(OptionsError, match=reason) as caught:
        Options.parse({"passes": passes})
    assert "\n" not in str(caught.value)
    with pytest.raises(OptionsError, match=reason):
        ModelCompiler(tiny.model("llama"), passes=passes)


def test_a_name_of_two_packages_is_nobody_s(far: Path) -> None:
    (far / "farther-0.1.dist-info").mkdir()
    (far / "farther-0.1.dist-info" / "METADATA").write_text("Name: farther\nVersion: 0.1\n")
    offer = "[llm42c.passes]\nlarger_eps = farther:LARGER_EPS\n"
    (far / "farther-0.1.dist-info" / "entry_points.txt").write_text(offer)
    with pytest.raises(OptionsError, match="say which of far_pass:LARGER_EPS, farther:LARGER_EPS"):
        find_passes(["larger_eps"])
    assert find_passes(["far_pass:LARGER_EPS"])[0].name == "larger_eps"


def nothing(graph: fx.Graph, ctx: Context, report: PassReport, **options: Any) -> None:
    """A pass that finds nothing."""


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (Pass("check", nothing), "name of another pass"),
        (Pass("a b", nothing), "no identifier"),
        (Pass("p", nothing, before="rms_nrm"), "did you mean 'rms_norm'"),
        (Pass("p", nothing, frozenset({"gpu"})), "kinds of graph are packed, plain, stock"),
        (Pass("p", nothing, frozenset()), "kinds of graph are"),
        (Pass("p", print), "is no function"),
        (Pass("p", functools.partial(nothing, a=object())), "no plain values"),
        (Pass("p", eval("lambda graph, ctx, report: None")), "without a file"),
    ],
)
def test_passes_that_cannot_stand_in_the_list(step: Pass, reason: str) -> None:
    with pytest.raises(OptionsError, match=reason):
        Options.parse({"passes": [step]})


def test_a_pass_needs_a_graph_to_rewrite() -> None:
    with pytest.raises(OptionsError, match="reductions='fixed'"):
        Options.parse({"passes": [Pass("p", nothing)], "reductions": "free"})


def test_its_uuid_is_of_its_source_options_and_place(far: Path) -> None:
    def uuid(edit: Callable[[str], str] = str, **options: Any) -> str:
        sys.modules.pop("far_pass", None)
        (far / "far_pass.py").write_text(edit(source))
        (step,) = find_passes(["larger_eps"])
        assert isinstance(step.apply, functools.partial)
        apply = functools.partial(step.apply, **options) if options else step.apply
        return Pass(step.name, apply, before=step.before).uuid

    source = (far / "far_pass.py").read_text()
    first = uuid()
    assert uuid(lambda text: text + "# a remark\n") == first
    assert uuid(lambda text: text.replace("eps >= least", "eps > least")) != first
    assert uuid(least=1e-3) != first
    (step,) = find_passes(["larger_eps"])
    assert Pass(step.name, step.apply, before="linear").uuid != step.uuid


def test_each_stands_where_it_says() -> None:
    added = [
        Pass("one", nothing, before="layout"),
        Pass("two", nothing, frozenset({PACKED}), before="rms_norm"),
        Pass("three", nothing, before="layout"),
    ]
    names = [p.name for p in pipeline.passes_for(PACKED, added)]
    at = names.index("layout")  # the first of two
    assert names[at - 2 : at] == ["one", "three"]
    assert names[names.index("two") + 1] == "rms_norm"
    plain = [p.name for p in pipeline.passes_for(PLAIN, added)]
    assert "two" not in plain
    assert plain[plain.index("one") :] == ["one", "three", "check"]  # `layout` runs on packed graphs only
    with pytest.raises(ValueError, match="which is no pass"):
        pipeline.passes_for(PLAIN, [Pass("p", nothing, before="q")])


def unordered(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    """Puts a sum of no known order into the graph."""
    out = next(n for n in graph.nodes if n.op == "output")
    (value,) = out.args[0]
    total = g.insert(out, torch.logcumsumexp, (value, -1))
    out.args = ((total,),)


def without_a_value(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    out = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(out):
        out.args = ((graph.call_function(torch.neg, (out.args[0][0],)),),)


def broken(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
    raise KeyError("mine")


def test_the_check_looks_at_what_it_made() -> None:
    with pytest.raises(UnsupportedModelError, match="logcumsumexp"):
        llm42c.explain(torch.exp, X, {"passes": [Pass("unordered", unordered)], "strict": True})
    llm42c.explain(torch.exp, X, {"strict": True})


@pytest.mark.parametrize("before", ["normalize", "check"])
def test_its_faults_bear_its_name(before: str) -> None:
    gm = torch._dynamo.export(lambda x: x.exp())(X).graph_module
    with pytest.raises(g.IllegalRewriteError, match=r"the pass careless made .* without a value"):
        pipeline.run(gm, Context(), added=[Pass("careless", without_a_value, before=before)])
    with pytest.raises(KeyError) as caught:
        pipeline.run(gm, Context(), added=[Pass("broken", broken, before=before)])
    assert caught.value.__notes__ == [f"in the pass broken of {__name__}"]
