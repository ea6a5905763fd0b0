"""What a user can read: explain, dumps, option errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import transformers as hf

import llm42c
from llm42c.compile.compiler import ModelCompiler
from llm42c.compile.dump import Dump, text
from llm42c.errors import OptionsError
from llm42c.inspect.explanation import explain_engine
from llm42c.options import Options
from llm42c.passes import pipeline


def test_explain_a_model(tmp_path: Path) -> None:
    built = tiny.model("llama")
    found = llm42c.explain(built, {"input_ids": tiny.ids(2, 9)}, {"dump": str(tmp_path)})
    (graph,) = found.graphs
    assert graph.operators == {"linear_dense": 15, "add_rms_norm": 4, "dense_attention": 2, "rms_norm": 1}
    assert graph.inductor["embedding"] == 1
    assert not found.unplaced
    page = str(found)
    assert "model.layers.*.self_attn" in page  # where it fired
    assert "Inductor compiles the product" in page  # why something else did not
    assert "every call has a fixed order" in page
    names = {p.name for p in next(tmp_path.iterdir()).iterdir()}
    assert {"00_input.txt", "report.txt"} <= names
    assert any(name.endswith("_attention_sdpa.txt") for name in names)


def test_explain_says_what_it_cannot_place() -> None:
    found = llm42c.explain(lambda x: x.logcumsumexp(-1) + 1, torch.randn(2, 5))
    assert "logcumsumexp" in str(found)
    assert len(found.unplaced) == 1


def test_explaining_often_leaves_the_model_alone() -> None:
    """More often than Dynamo's recompile limit."""
    layer = torch.nn.Linear(4, 4)
    pages = {str(llm42c.explain(layer, [torch.ones(2, 4)])).split("operators")[1] for _ in range(10)}
    assert len(pages) == 1


def test_dump_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM42_DUMP", str(tmp_path))
    torch._dynamo.reset()
    x = torch.randn(3, 5)
    torch.compile(lambda x: torch.tanh(x).mean(-1), backend="llm42")(x)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "0000_plain"
    code = "".join(p.read_text() for p in folder.glob("inductor_*.py"))
    assert "tanh" in code
    assert "row_sum" in code
    assert "reductions" in (folder / "report.txt").read_text()


def test_dump_of_an_engine_s_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM42_DUMP", str(tmp_path))
    compiler = ModelCompiler(tiny.model("llama"), keep_originals=True)
    for form, folder in (("pinned", "0000_packed"), ("stock", "0001_stock")):
        compiler.compile(form)
        found = {p.name for p in (tmp_path / folder).iterdir()}
        assert {"00_input.txt", "report.txt", "program.py"} <= found
        assert "paged_attention" in (tmp_path / folder / "program.py").read_text()


def test_a_dump_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM42_DUMP", str(tmp_path / "file" / "below"))
    with pytest.raises(OptionsError, match="LLM42_DUMP"):
        Dump.for_options(Options(), "plain")


def test_no_dump_without_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM42_DUMP", raising=False)
    dump = Dump.for_options(Options(), "plain")
    dump.write("x.txt", "nothing")
    with dump.generated_code():
        pass


def test_a_graph_as_text() -> None:
    _, captured = tiny.captured_copy("llama")
    pipeline.run(captured.gm, tiny.packed_context(captured))
    page = text(captured.gm.graph)
    assert "llm42.paged_attention(" in page
    assert "# f32[1," in page
    assert page.splitlines()[-1].startswith("return")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reductons": "fixed"}, "did you mean 'reductions'"),
        ({"dmup": "x"}, "did you mean 'dump'"),
        ({"reductions": True}, "must be one of"),
        ({"strict": 1}, "must be bool"),
        ({"dump": 3}, "must be str or NoneType"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        Options.parse(options)


def test_options_have_defaults() -> None:
    assert Options.parse() == Options() == Options(reductions="fixed", strict=False, dump=None)
    assert Options.parse({"strict": True}, mode="default").strict


def test_the_engine_s_page_names_orders_as_the_contract_does_and_foreign_calls() -> None:
    found = explain_engine(ModelCompiler(tiny.model("llama")))
    assert str(found.orders["linear"]) == "fma-chain/2"
    assert found.orders.keys() == found.operators.keys()
    assert found.foreign == {}
    assert "    linear: fma-chain/2 (One fp32 chain" in str(found)
    # Two layers of 2 × (40·64 + 32·40 + 72·40) and the head's 40·101; gate and up are 40·144.
    assert found.costs["linear"].flops == 2 * (2 * (40 * 64 + 32 * 40 + 72 * 40) + 40 * 101)
    assert found.costs["linear_silu_mul"].flops == 2 * 2 * 40 * 144
    assert found.costs["linear_silu_mul"].bytes == 2 * 4 * (40 + 3 * 40 * 48 + 72)
    assert found.costs.keys() == {"linear", "linear_silu_mul"}
    assert f"; a token: {found.costs['linear']}" in str(found)
    assert "of these neither ours nor exact: nothing" in str(found)
    torch.manual_seed(0)
    small = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(**small, head_dim=8, vocab_size=101, hidden_act="gelu_pytorch_tanh")
    compiler = ModelCompiler(hf.LlamaForCausalLM(config).eval())
    foreign = explain_engine(compiler)
    assert foreign.foreign == compiler.compile("pinned").computation.foreign
    assert "of these neither ours nor exact: gelu ×2" in str(foreign)
