"""The packed pipeline: what is left of a layer, and that fusing changes no bit."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from torch import fx

from llm42c.compile.piecewise import compile_piecewise
from llm42c.compile.weights import WeightStore
from llm42c.passes import graph as g
from llm42c.passes import pipeline
from llm42c.passes.kinds import Kind, kind

# What must come out, in the order of one layer; the last layer's second norm is the model's own.
_LLAMA_LAYER = [
    "linear",
    "rotary",
    "paged_attention",
    "linear",
    "add_rms_norm",
    "linear_silu_mul",
    "linear",
    "add_rms_norm",
]


def _operators(graph: fx.Graph) -> list[str]:
    return [
        g.name(n).removeprefix("llm42::")
        for n in graph.nodes
        if n.op == "call_function" and kind(n) is Kind.OPERATOR
    ]


def _others(graph: fx.Graph) -> Counter[str]:
    calls = (n for n in graph.nodes if n.op in ("call_function", "call_method"))
    return Counter(g.name(n) for n in calls if kind(n) not in (Kind.OPERATOR, Kind.VIEW, Kind.SIZE))


def _logits(captured, gm, store, ids, dtype):
    store.materialise(gm)
    program = compile_piecewise(gm)
    with torch.no_grad():
        return program(*tiny.packed_arguments(captured, ids, dtype))[0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_layer_is_eight_operators(family):
    _, captured = tiny.captured_copy(family)
    report = pipeline.run(captured.gm, tiny.packed_context(captured))
    graph = captured.gm.graph
    assert _operators(graph) == ["rms_norm", *_LLAMA_LAYER, *_LLAMA_LAYER, "linear"]
    # Besides views: the embedding, the rows of the cosine and sine tables, the rows that are wanted, of
    # attention's results and of the residual stream.
    assert _others(graph) == {"embedding": 1, "index_select": 4}
    assert not report.unplaced
    views = [n for n in graph.nodes if n.op.startswith("call") and kind(n) is Kind.VIEW]
    views = [n for n in views if not isinstance(g.value(n.args[0]), tuple)]
    assert len(views) <= 5 * 2 + 5


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_every_call_is_placed(family):
    _, captured = tiny.captured_copy(family)
    report = pipeline.run(captured.gm, tiny.packed_context(captured))
    assert not report.unplaced
    counts = Counter(_operators(captured.gm.graph))
    assert counts["paged_attention"] == 2
    if family != "gpt2":
        assert len(report["rotary"].matches) == 4
        assert len(report["merge_rotary"].matches) == (0 if family in ("qwen3", "olmo2") else 4)
        assert len(report["position_table"].matches) >= 2
    if family in ("llama", "qwen2", "qwen3", "phi3", "olmo2"):
        assert counts["linear_silu_mul"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "olmo2"])
def test_fusing_changes_no_bit(family, dtype, monkeypatch):
    """Merged linears, fused norms, rotary and layouts: the same bits as the operators one by one.

    ``linear_silu_mul`` stays in both: its exponential is not the one that Inductor calls.
    """
    ids = tiny.ids(23)
    built, fused = tiny.captured_copy(family, dtype)
    pipeline.run(fused.gm, tiny.packed_context(fused))
    _, plain = tiny.captured_copy(family, dtype)
    basic = {"normalize", "dead_code", "position_table", "rms_norm", "linear_silu_mul", "linear"}
    monkeypatch.setattr(pipeline, "PASSES", tuple(p for p in pipeline.PASSES if p.name in basic))
    pipeline.run(plain.gm, tiny.packed_context(plain))
    assert len(plain.gm.graph.nodes) > len(fused.gm.graph.nodes) + 10
    store = WeightStore(built)
    a = _logits(fused, fused.gm, store, ids, dtype)
    b = _logits(plain, plain.gm, store, ids, dtype)
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_close_to_the_model(family):
    """Not bit for bit: eager code sums in other orders."""
    ids = tiny.ids(23)
    with torch.no_grad():
        exact = tiny.model(family).double()(ids[None]).logits
    built, captured = tiny.captured_copy(family)
    pipeline.run(captured.gm, tiny.packed_context(captured))
    got = _logits(captured, captured.gm, WeightStore(built), ids, torch.float32)
    # About 20 roundings of relative size 2^-24 a layer, on sums of up to 101 terms of size |logits|.
    bound = 40 * 101 * 2.0**-24 * exact.abs().max()
    assert (got - exact).abs().max() <= bound


def test_the_same_model_gives_the_same_graph():
    """Nothing in the pipeline depends on addresses, hashes or earlier runs."""
    texts = []
    for _ in range(2):
        captured = tiny.capture(tiny.model("llama"))
        pipeline.run(captured.gm, tiny.packed_context(captured))
        texts.append([(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in captured.gm.graph.nodes])
    assert texts[0] == texts[1]


def test_a_table_that_is_too_large_is_not_made():
    _, captured = tiny.captured_copy("llama")
    report = pipeline.run(captured.gm, tiny.packed_context(captured, limit=1 << 22))
    assert not report["position_table"].matches
    assert "MiB" in " ".join(report["position_table"].reasons())


def test_frequencies_that_were_cast_are_constants_still():
    """`model.to(bfloat16)` casts the rotary frequencies too; the graph casts them back in every step."""
    captured = tiny.capture(tiny.model("llama").to(torch.bfloat16))
    assert any(t.dtype == torch.bfloat16 for n, t in captured.gm.named_buffers() if "inv_freq" in n)
    report = pipeline.run(captured.gm, tiny.packed_context(captured))
    assert len(report["position_table"].matches) >= 2
