"""The contract of real graphs: it changes with each thing that bits depend on, and with nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import fx

import llm42c
from llm42c.codegen.cpu import target as cpu
from llm42c.codegen.ops.registry import operators
from llm42c.codegen.order import Order
from llm42c.compile import computation, inductor
from llm42c.compile.compiler import ModelCompiler
from llm42c.digest import graph_digest
from llm42c.passes import pipeline, rms_norm
from llm42c.passes.base import Pass
from llm42c.runtime import contract as contract_module
from llm42c.runtime.contract import Contract
from llm42c.runtime.loader import build_engine

LIMITS: dict[str, Any] = {
    "page_size": 16, "num_pages": 24, "max_num_seqs": 4, "max_num_batched_tokens": 32,
    "verify_tokens": 16, "verify_seqs": 4, "persist_certificates": False,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 101, "max_position_embeddings": 96,
}  # fmt: skip


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of one layer, with ``changes`` in its configuration."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | changes)).eval()
    frequencies = model.model.rotary_emb.inv_freq
    model.to(dtype).model.rotary_emb.inv_freq = frequencies  # as a checkpoint is loaded
    return model


def contract_of(model: Any = None, **options: Any) -> Contract:
    built = build_engine(llama() if model is None else model, **LIMITS | options)
    try:
        return built.engine.contract
    finally:
        built.close()


@pytest.fixture(scope="module")
def known() -> Contract:
    """The contract that changes are compared with."""
    return contract_of()


def test_a_graph_of_ordered_operators_hangs_on_no_machine(known: Contract) -> None:
    assert known.machine == {}
    assert known.target == "cpu"
    assert {"linear", "rms_norm", "rotary", "paged_attention", "sample"} <= known.orders.keys()
    assert known.orders["linear"] == "fma-chain/2"
    assert known.implementation.keys() == {"kernels", "rules"}


def test_the_same_model_has_it_again(known: Contract) -> None:
    contract_of(llama(hidden_size=48))  # what Dynamo has seen before must not matter
    assert contract_of() == known


# -- what bits depend on -------------------------------------------------------------------------------------


def _one_bit() -> Any:
    model = llama()
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight.view(torch.int32)[3, 5] ^= 1
    return model


def _scale(model: Any, **values: float) -> Any:
    for name, value in values.items():
        module: Any = model.model.rotary_emb if hasattr(model.model.rotary_emb, name) else None
        module = module or model.model.layers[0].self_attn
        assert hasattr(module, name)
        setattr(module, name, value)
    return model


MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "one bit of a weight": (_one_bit, {"weights"}),
    "dtype": (lambda: llama(torch.bfloat16), {"weights", "dtype", "graph"}),
    "eps": (lambda: llama(rms_norm_eps=1e-5), {"graph"}),
    "scale of attention": (lambda: _scale(llama(), scaling=0.25), {"graph"}),
    "scale of the angles": (lambda: _scale(llama(), attention_scaling=1.5), {"graph"}),
    "base of the angles": (
        lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 777.0}),
        {"weights", "graph"},
    ),
    "positions in the table": (lambda: llama(max_position_embeddings=128), {"graph"}),
}


@pytest.mark.parametrize("change", MODELS)
def test_the_model(change: str, known: Contract) -> None:
    make, fields = MODELS[change]
    other = contract_of(make())
    assert {line.split(":")[0] for line in known.diff(other)} == fields


@pytest.fixture
def compiled() -> Iterator[Callable[[], str]]:
    """``graph()``: the digest of one captured graph after the passes as they are then."""
    source = ModelCompiler(llama())

    def graph() -> str:
        source._compiled.clear()
        source.weights.restore()
        return source.compile("pinned").computation.graph

    yield graph
    source.restore()


def test_every_pass_that_fires(compiled: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off, or declining: the graph that runs is another one, and so is its digest."""
    before, passes = compiled(), pipeline.PASSES
    assert compiled() == before
    digests = {before}
    names = ("position_table", "add_rms_norm", "linear_silu_mul", "merge_linears", "rotary", "merge_rotary")
    for name in names:
        off = tuple(Pass(p.name, lambda *_: None, p.targets) if p.name == name else p for p in passes)
        monkeypatch.setattr(pipeline, "PASSES", off)
        digest = compiled()
        assert digest not in digests, f"{name} switched off is not noticed"
        digests.add(digest)


def test_a_constant_in_a_pass(compiled: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled()

    def worse(graph: fx.Graph, ctx: Any, report: Any) -> None:
        rms_norm.rms_norm(graph, ctx, report)
        norm = next(n for n in graph.nodes if n.target is torch.ops.llm42.rms_norm.default)
        norm.args = (*norm.args[:2], norm.args[2] * (1 + 2**-20), *norm.args[3:])

    changed = tuple(Pass(p.name, worse, p.targets) if p.name == "rms_norm" else p for p in pipeline.PASSES)
    monkeypatch.setattr(pipeline, "PASSES", changed)
    assert compiled() != before


def _other_eps(graph: fx.Graph, ctx: Any, report: Any, *, factor: float) -> None:
    for norm in [n for n in graph.nodes if n.target is torch.ops.llm42.rms_norm.default]:
        norm.args = (*norm.args[:2], norm.args[2] * factor, *norm.args[3:])


def test_a_pass_of_another_package(known: Contract) -> None:
    """Its effect is part of the contract, its name is not."""
    same, other = (
        [Pass("other_eps", functools.partial(_other_eps, factor=factor), before="add_rms_norm")]
        for factor in (1.0, 2.0)
    )
    changed = contract_of(passes=other)
    assert [line.split(":")[0] for line in known.diff(changed)] == ["graph"]
    assert contract_of(passes=same) == known
    model = llm42c.deterministic(llama(), passes=other, **LIMITS)
    assert model.llm42.contract.graph == changed.graph


@pytest.mark.parametrize("change", ["verify_tokens", "verify_seqs", "verify_rows", "page_size"])
def test_shapes(change: str, known: Contract) -> None:
    other = contract_of(**{change: {"page_size": 32, "verify_tokens": 32}.get(change, 3)})
    assert change in {line.split(":")[0] for line in known.diff(other)}


def test_the_version_of_an_order(known: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators()["rotary"].orders, "cpu", Order("pointwise", 2, ""))
    assert known.diff(contract_of()) == ["orders.rotary: pointwise/1 -> pointwise/2"]


def test_an_order_that_is_not_called_is_none_of_it(known: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators()["layer_norm"].orders, "cpu", Order("lanes16", 2, ""))
    assert contract_of() == known


def test_the_rules_and_the_sources(known: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contract_module.RULES, "noise", "another/1")
    monkeypatch.setattr(cpu, "kernels_digest", lambda: "edited")
    fields = {line.split(":")[0] for line in known.diff(contract_of())}
    assert fields == {"rules.noise", "implementation.kernels"}


# -- what they do not depend on ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"fast": "stock"},
        {"num_pages": 30},
        {"max_num_seqs": 2},
        {"prefix_cache": False},
        {"audit_fraction": 0.5, "verify": "always"},
        {"certify": "startup", "fast_buckets": (8, 32)},
        {"keep_originals": True},
    ],
    ids=str,
)
def test_how_an_engine_runs(change: dict[str, Any], known: Contract) -> None:
    assert contract_of(**change) == known


def test_machine_and_settings(known: Contract, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Threads, instruction set, versions, settings of a compiler that is not called, folders: no field."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    monkeypatch.setattr(cpu, "filling_the_memory", lambda: 7)
    monkeypatch.setitem(inductor._FIXED, "epilogue_fusion", False)
    monkeypatch.setenv("LLM42_DUMP", str(tmp_path))
    state = computation.machine_state()
    try:
        torch.set_num_threads(threads + 1)
        assert contract_of() == known
        assert computation.machine_state() != state, "vacuous: nothing was changed"
    finally:
        torch.set_num_threads(threads)


def test_names_and_the_order_of_independent_calls() -> None:
    def graph(names: tuple[str, str], swapped: bool, last: float = 3.0) -> fx.GraphModule:
        built = fx.Graph()
        x = built.placeholder(names[0])
        calls = [(torch.mul, 2.0), (torch.add, last)]
        made = {f: built.call_function(f, (x, c)) for f, c in (calls[::-1] if swapped else calls)}
        for node in made.values():
            node.name = f"{names[1]}_{node.name}"
        built.call_function(torch.neg, (x,))  # dead
        built.output((made[torch.mul], made[torch.add]))
        return fx.GraphModule({}, built)

    known = graph_digest(graph(("x", "a"), False))
    assert graph_digest(graph(("y", "b"), True)) == known
    assert graph_digest(graph(("x", "a"), False, last=3.5)) != known


def test_a_tensor_that_is_no_weight_counts_by_its_contents() -> None:
    def digest(value: float, weights: tuple[str, ...] = ()) -> str:
        built = fx.Graph()
        x = built.placeholder("x")
        built.output(built.call_function(torch.mul, (x, built.get_attr("c"))))
        module = torch.nn.Module()
        module.register_buffer("c", torch.tensor(value))
        return graph_digest(fx.GraphModule(module, built), weights)

    assert digest(1.0) != digest(2.0)
    assert digest(1.0, ("c",)) == digest(2.0, ("c",))


# -- calls that are not ours ---------------------------------------------------------------------------------


def test_what_other_calls_hang_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An activation that Inductor compiles brings machine, versions and settings into the contract."""
    source = ModelCompiler(llama(hidden_act="gelu_pytorch_tanh"))
    found = source.compile("pinned").computation
    assert found.foreign
    assert {"torch", "inductor", "isa", "cpu", "libc", "compiler"} == found.machine.keys()

    def again() -> computation.Computation:
        source._compiled.clear()
        source.weights.restore()
        return source.compile("pinned").computation

    assert again() == found
    monkeypatch.setitem(inductor._FIXED, "emulate_precision_casts", False)
    other = again()
    assert other.machine["inductor"] != found.machine["inductor"]
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert dataclasses.replace(again(), machine=found.machine) == found
    assert again().machine["isa"] == "another"
    source.restore()
