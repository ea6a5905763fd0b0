"""Stored graphs: a second process runs the same without tracing, and a wrong or stale entry is never used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from torch import nn

from llm42c.capture import hf_interface
from llm42c.capture.packed import PackedInputs
from llm42c.codegen import cache
from llm42c.compile import identity, programs, rewriter, stored
from llm42c.compile.compiler import CompiledModel, Form, ModelCompiler
from llm42c.digest import graph_digest
from llm42c.passes import pipeline
from llm42c.passes.base import Pass

FORMS: tuple[Form, ...] = get_args(Form)


def small(family: str = "llama") -> Any:
    """Tracing costs seconds a layer."""
    return tiny.model(family, layers=1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of stored graphs, instead of the user's."""
    monkeypatch.setattr(programs, "FOLDER", str(tmp_path / "programs"))
    return tmp_path / "programs"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were traced."""
    found: list[nn.Module] = []
    trace = rewriter.capture_packed

    def watched(model: nn.Module) -> Any:
        found.append(model)
        return trace(model)

    monkeypatch.setattr(rewriter, "capture_packed", watched)
    return found


def logits(model: CompiledModel) -> torch.Tensor:
    tokens = 21
    inputs = PackedInputs(
        input_ids=tiny.ids(tokens),
        positions=torch.arange(tokens),
        slot_mapping=torch.arange(tokens) + 16,
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32),
        kv_lens=torch.tensor([tokens], dtype=torch.int32),
        block_table=torch.arange(1, 9, dtype=torch.int32)[None],
        logits_indices=torch.arange(tokens),
    )
    return model.forward(inputs, model.new_kv_cache(9, 16)).clone()


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_the_second_process_traces_nothing_and_computes_the_same(
    family: str, traced: list[nn.Module]
) -> None:
    compiler = ModelCompiler(tiny.model(family))
    firsts = [compiler.compile(form) for form in FORMS]
    assert len(traced) == 1
    compiler = ModelCompiler(tiny.model(family))
    for form, first in zip(FORMS, firsts, strict=True):
        second = compiler.compile(form)
        assert any("earlier process" in note for note in second.report.notes)
        assert second.computation == first.computation
        assert second.program.source == first.program.source
        assert second.report.passes == first.report.passes
        assert torch.equal(logits(second), logits(first))
        assert logits(first).abs().max() > 0, "nothing was computed"
    assert len(traced) == 1


def test_other_weights_are_computed_with(traced: list[nn.Module]) -> None:
    """The graph is the model's class's; no weight is in it."""
    models = [small("qwen2") for _ in range(3)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.25)
        models[2].load_state_dict(models[1].state_dict())
    whole = logits(ModelCompiler(models[0]).compile())
    loaded = logits(ModelCompiler(models[1]).compile())
    assert len(traced) == 1
    assert not torch.equal(whole, loaded)
    hidden = programs.FOLDER + "-none"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "FOLDER", hidden)
        assert torch.equal(loaded, logits(ModelCompiler(models[2]).compile()))
    assert len(traced) == 2


def _eps(model: Any) -> None:
    model.config.rms_norm_eps *= 2


def _attribute(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 0.5


def _tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _dtype(model: Any) -> None:
    model.bfloat16()


def _mode(model: Any) -> None:
    model.train()


def _hook(model: Any) -> None:
    model.model.layers[0].register_forward_pre_hook(lambda module, args: None)


CHANGES: list[Callable[[Any], None]] = [_eps, _attribute, _tied, _dtype, _mode, _hook]


@pytest.mark.parametrize("change", CHANGES)
def test_another_state_of_the_model_is_another_key(change: Callable[[Any], None]) -> None:
    before, model = identity.identity(small()), small()
    assert identity.identity(model) == before
    change(model)
    assert identity.identity(model) != before


def test_options_and_versions_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    keys = {identity.identity(model, 1, True), identity.identity(model, 2, True)}
    for module, name in ((torch, "__version__"), (identity.transformers, "__version__"), (sys, "version")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "another")
            keys.add(identity.identity(model, 1, True))
    assert len(keys) == 5


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of somebody's own with a decoder, a helper beside it, and a way to edit its files."""
    package = tmp_path / "own_decoder"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("def scaled(x):\n    return x * 2\n")
    (package / "modeling.py").write_text(
        "import transformers as hf\n"
        "from own_decoder.helper import scaled\n"
        "class Own(hf.LlamaForCausalLM):\n"
        "    def forward(self, input_ids=None, position_ids=None, logits_to_keep=0, **kw):\n"
        "        out = super().forward(input_ids=input_ids, position_ids=position_ids,\n"
        "                              logits_to_keep=logits_to_keep, **kw)\n"
        "        out.logits = scaled(out.logits)\n"
        "        return out\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    class Own:
        folder = package

        def model(self) -> Any:
            for name in [n for n in sys.modules if n.startswith("own_decoder")]:
                del sys.modules[name]
            importlib.invalidate_caches()
            torch.manual_seed(0)
            made = importlib.import_module("own_decoder.modeling").Own(tiny.CONFIGS["llama"]())
            return made.eval()

    yield Own()
    for name in [n for n in sys.modules if n.startswith("own_decoder")]:
        del sys.modules[name]


def test_an_edited_source_is_not_served_from_the_store(own: Any, traced: list[nn.Module]) -> None:
    before = logits(ModelCompiler(own.model()).compile())
    assert torch.equal(logits(ModelCompiler(own.model()).compile()), before)
    assert len(traced) == 1
    file = own.folder / "helper.py"
    file.write_text(file.read_text().replace("x * 2", "x * 3 "))  # beside the class, of another length
    after = logits(ModelCompiler(own.model()).compile())
    assert len(traced) == 2
    assert not torch.equal(before, after)


def test_a_function_replaced_at_run_time_counts(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own.model()
    before = identity.identity(model)
    modeling = sys.modules["own_decoder.modeling"]
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "scaled", lambda x: x * 5)
        assert identity.identity(model) != before
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", lambda self, **kw: None)
        assert identity.identity(model) != before
    with monkeypatch.context() as patch:
        patch.setattr(hf_interface, "mask_marker", lambda *a, **kw: None)
        assert identity.identity(model) != before
    assert identity.identity(model) == before


def test_an_edited_pass_and_another_list_of_passes(
    monkeypatch: pytest.MonkeyPatch, traced: list[nn.Module]
) -> None:
    first = ModelCompiler(small()).compile()
    off = tuple(Pass(p.name, _nothing, p.targets) if p.name == "rotary" else p for p in pipeline.PASSES)
    monkeypatch.setattr(pipeline, "PASSES", off)
    second = ModelCompiler(small()).compile()
    assert len(traced) == 2
    assert first.computation.graph != second.computation.graph

    model = small()
    before = identity.identity(model)
    monkeypatch.setattr(identity, "sources", lambda: ("passes/rotary.py edited",))
    assert identity.identity(model) != before


def _nothing(*_: Any) -> None:
    pass


def test_the_digest_of_sources_follows_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("passes", "capture", "runtime"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(identity, "_ROOT", tmp_path)
    before = identity.sources.__wrapped__()
    for part, counts in (("passes", True), ("capture", True), ("runtime", False)):
        (tmp_path / part / "a.py").write_text("x = 2\n")
        after = identity.sources.__wrapped__()
        assert (after != before) == counts
        before = after


def test_what_has_no_name_is_traced_each_time(traced: list[nn.Module]) -> None:
    for _ in range(2):
        model = small()
        model.remark = iter([])
        report = ModelCompiler(model).compile().report
        assert any("at every start" in note for note in report.notes), report.notes
    assert len(traced) == 2


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "no seal": lambda data: data[:-32],
    "foreign": lambda data: b"\x80\x04" + data[2:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew(damage: str, folder: Path, traced: list[nn.Module]) -> None:
    expected = logits(ModelCompiler(small()).compile())
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(DAMAGES[damage](whole))
    assert torch.equal(logits(ModelCompiler(small()).compile()), expected)
    assert len(traced) == 2
    assert cache.sealed(entry) is not None, "not written again"


def test_an_entry_under_another_name_is_not_used(folder: Path, traced: list[nn.Module]) -> None:
    """Whole, sealed, of the right model, but of another key: the names of two entries were exchanged."""
    ModelCompiler(small()).compile()
    (mine,) = folder.iterdir()
    double = small()
    double.config.rms_norm_eps *= 2
    for norm in [m for m in double.modules() if hasattr(m, "variance_epsilon")]:
        norm.variance_epsilon *= 2
    ModelCompiler(double).compile()
    (other,) = set(folder.iterdir()) - {mine}
    mine.write_bytes(other.read_bytes())
    traced.clear()
    ModelCompiler(small()).compile()
    assert len(traced) == 1


def test_a_text_of_another_graph_is_not_used(folder: Path, traced: list[nn.Module]) -> None:
    """Sealed anew, with a constant changed: the digest of the graph shows it."""
    ModelCompiler(small()).compile()
    (entry,) = folder.iterdir()
    content = cache.sealed(entry)
    assert content is not None
    eps = float(tiny.CONFIGS["llama"]().rms_norm_eps).hex().encode()
    assert eps in content
    cache.write(entry, content.replace(eps, (0.5).hex().encode()), seal=True)
    ModelCompiler(small()).compile()
    assert len(traced) == 2


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "eval", "subprocess.run", "sys.exit"])
def test_a_text_calls_only_what_graphs_call(name: str) -> None:
    with pytest.raises(stored.FAULTS):
        stored._resolved(name)


def test_the_text_gives_the_graph_back() -> None:
    built, captured = tiny.captured_copy("gemma2")
    report = pipeline.run(captured.gm, tiny.packed_context(captured))
    graph = stored.Rewritten(captured.gm, captured.inputs, captured.parameter_names, captured.kv_spec, report)
    again = stored.decode(stored.encode(graph), built)
    assert graph_digest(again.gm, again.weights) == graph_digest(graph.gm, graph.weights)
    assert stored.encode(again) == stored.encode(graph)


def test_a_folder_that_cannot_be_written_costs_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: list[nn.Module]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(programs, "FOLDER", str(tmp_path / "file" / "programs"))
    for _ in range(2):
        ModelCompiler(small()).compile()
    assert len(traced) == 2


def test_dumped_graphs_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: list[nn.Module]
) -> None:
    ModelCompiler(small()).compile()
    monkeypatch.setenv("LLM42_DUMP", str(tmp_path / "dump"))
    ModelCompiler(small()).compile()
    assert len(traced) == 2
    assert list((tmp_path / "dump").rglob("00_input.txt"))
