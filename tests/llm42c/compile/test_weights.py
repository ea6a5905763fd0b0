"""One packed copy of each weight; the originals come back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch import fx

from llm42c.compile.weights import WeightStore, _tabulate
from llm42c.passes import pipeline
from llm42c.passes.recipes import PositionTable


def _packed(family, dtype=torch.bfloat16, **options):
    built = tiny.model(family, dtype)
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    captured = tiny.capture(built)
    pipeline.run(captured.gm, tiny.packed_context(captured))
    store = WeightStore(built, **options)
    store.materialise(captured.gm)
    return built, before, captured, store


def _same(state, before):
    return state.keys() == before.keys() and all(
        torch.equal(state[n], before[n]) and state[n].dtype == before[n].dtype for n in before
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "gemma2"])
def test_originals_are_freed_and_come_back(family, dtype, tmp_path):
    built, before, captured, store = _packed(family, dtype)
    freed = store.release(captured.gm)
    assert freed > 0
    assert any(store.is_released(p) for p in built.parameters())
    assert sum(p.untyped_storage().nbytes() for p in built.parameters() if store.is_released(p)) < 1000
    assert _same(built.state_dict(), before)  # and still visible
    built.save_pretrained(tmp_path)
    reloaded = type(built).from_pretrained(tmp_path, dtype=dtype)
    assert _same(reloaded.state_dict(), before)
    store.restore()
    assert not any(store.is_released(p) for p in built.parameters())
    assert _same(built.state_dict(), before)
    with torch.no_grad():
        assert built(tiny.ids(1, 5)).logits.isfinite().all()


def test_tied_embeddings_stay_one_tensor():
    """The embedding reads its weight row by row, so a tied output layer must not free it."""
    built, before, captured, store = _packed("gemma2")
    assert built.config.tie_word_embeddings
    store.release(captured.gm)
    assert built.get_input_embeddings().weight.numel() > 0
    store.restore()
    assert built.lm_head.weight is built.model.embed_tokens.weight
    assert _same(built.state_dict(), before)


def test_keeping_the_originals():
    built, before, captured, store = _packed("llama", keep_originals=True)
    assert store.release(captured.gm) == 0
    assert _same(dict(built.named_parameters()), {n: before[n] for n, _ in built.named_parameters()})


def test_two_graphs_share_one_copy():
    built, _, captured, store = _packed("llama")
    size = store.nbytes
    second = tiny.capture(built)
    pipeline.run(second.gm, tiny.packed_context(second))
    store.materialise(second.gm)
    assert store.nbytes == size
    labels = [n for n, _ in captured.gm.named_buffers() if n.startswith("packed__")]
    assert labels
    assert all(getattr(captured.gm, n) is getattr(second.gm, n) for n in labels)


def test_a_graph_compiled_after_the_release_still_finds_its_weights():
    built, before, captured, store = _packed("llama")
    store.release(captured.gm)
    weight = next(n for n in before if n.endswith("q_proj.weight"))
    assert torch.equal(built.state_dict()[weight], before[weight])
    assert store.release(captured.gm) == 0  # nothing is freed twice


def _bytes(built):
    return sum(p.untyped_storage().nbytes() for p in built.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_each_original_is_freed_as_soon_as_it_is_packed(family, monkeypatch):
    built = tiny.model(family, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    captured = tiny.capture(built)
    pipeline.run(captured.gm, tiny.packed_context(captured))
    held = []
    build = WeightStore._build

    def watched(self, *arguments):
        held.append(_bytes(built) + store.nbytes)  # before each packed weight is made
        return build(self, *arguments)

    monkeypatch.setattr(WeightStore, "_build", watched)
    store = WeightStore(built)
    whole = _bytes(built)
    store.materialise(captured.gm, [captured.gm])
    # Columns are packed in panels of 48, so that small weights grow: their sum is the bound, not the model's.
    embedding = built.get_input_embeddings().weight.nbytes
    assert max(held) <= store.nbytes + embedding + max(p.nbytes for p in built.parameters()) + whole // 10
    assert _same(built.state_dict(), before)
    assert store.release(captured.gm) == 0
    store.restore()
    assert _same(built.state_dict(), before)


def test_a_second_reader_keeps_what_it_reads():
    built = tiny.model("llama", torch.bfloat16)
    plain, captured = tiny.capture(built), tiny.capture(built)
    pipeline.run(captured.gm, tiny.packed_context(captured))
    store = WeightStore(built)
    store.materialise(captured.gm, [plain.gm, captured.gm])
    assert not any(store.is_released(p) for p in built.parameters())
    assert store.release(captured.gm) > 0


def test_roots_of_a_table_are_correctly_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an eager root gives on this machine: here, a library's that is one unit off."""
    graph = fx.Graph()
    wide = graph.call_method("float", (graph.placeholder("positions"),))
    rows = graph.call_method("add", (wide, 1.0))
    root, inverse = graph.call_method("sqrt", (rows,)), graph.call_method("rsqrt", (rows,))
    graph.output(graph.call_function(torch.cat, ([root, inverse],)))
    table = PositionTable(graph, "roots", limit=4000)
    x = torch.arange(1, 4001, dtype=torch.float32)[None]
    exact = torch.from_numpy(np.sqrt(x.numpy()))
    wanted = torch.cat((exact, 1 / exact))

    monkeypatch.setattr(torch.Tensor, "sqrt", lambda _: torch.nextafter(exact, torch.zeros(())))
    assert torch.equal(_tabulate(fx.GraphModule({}, graph), table), wanted)
    eager = fx.Interpreter(fx.GraphModule({}, graph)).run(x.long() - 1)
    assert not torch.equal(eager, wanted)
