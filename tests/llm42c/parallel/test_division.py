"""Dividing models by their own plans (fake process group: shapes only). What is fused in the graphs that come
of it: test_weave_families.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import tp_families
from torch.testing._internal.distributed.fake_pg import FakeStore

from llm42c.capture.dynamo import capture_packed
from llm42c.digest import graph_digest
from llm42c.errors import UnsupportedModelError
from llm42c.parallel.ranks import Ranks
from llm42c.parallel.tensor_parallel import divide
from llm42c.passes import pipeline
from llm42c.passes.base import PACKED, Context, Report


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def place(rank: int, size: int = 2) -> Ranks:
    return Ranks(rank, size, dist.group.WORLD.group_name)


def pipelined(model: Any) -> tuple[Any, Report]:
    captured = capture_packed(model)
    report = pipeline.run(captured.gm, Context(target=PACKED))
    return captured, report


def test_all_ranks_have_one_graph():
    digests = set()
    for rank in (0, 1):
        model = tp_families.model("llama")
        divide(model, place(rank))
        captured, _ = pipelined(model)
        digests.add(graph_digest(captured.gm, captured.weights))
    assert len(digests) == 1
    whole, _ = pipelined(tp_families.model("llama"))
    assert graph_digest(whole.gm, whole.weights) not in digests


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "phi3"])
def test_the_parts_are_the_whole(family: str):
    """Every parameter is the same on all ranks or, put together, the original."""
    whole = dict(tp_families.model(family).named_parameters(remove_duplicate=False))
    parts = []
    for rank in (0, 1):
        model = tp_families.model(family)
        divide(model, place(rank))
        parts.append(dict(model.named_parameters(remove_duplicate=False)))
    assert parts[0].keys() == whole.keys()
    divided = 0
    for name, original in whole.items():
        a, b = (part[name].detach() for part in parts)
        if a.shape == original.shape:
            assert torch.equal(a, original)
            assert torch.equal(b, original)
            continue
        divided += 1
        dim = next(d for d in range(a.dim()) if a.shape[d] != original.shape[d])
        if name.endswith("experts.gate_up_proj"):
            pairs = [torch.cat(pieces, dim) for pieces in zip(a.chunk(2, dim), b.chunk(2, dim), strict=True)]
            assert torch.equal(torch.cat(pairs, dim), original)
        else:
            assert torch.equal(torch.cat([a, b], dim), original)
    assert divided >= 4 * tp_families.LAYERS


def test_a_block_that_cannot_be_divided_stays_whole():
    """Two KV heads on three ranks: the attention is left alone; 48 columns of the MLP are divided."""
    model = tp_families.model("llama")
    division = divide(model, place(2, 3))
    assert set(division.whole) == {f"model.layers.{i}.self_attn" for i in range(tp_families.LAYERS)}
    assert "4 heads on 3 ranks" in division.text()
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.shape[0] == 32
    assert layer.mlp.down_proj.weight.shape[1] == 16
    assert layer.mlp.down_proj.in_features == 16
    captured, report = pipelined(model)
    assert len(report["allreduce_rmsnorm"].matches) == tp_families.LAYERS
    assert captured.kv_spec[0].num_kv_heads == 2


def test_one_rank_divides_nothing():
    model = tp_families.model("llama")
    assert not divide(model, Ranks()).divided
    assert model.model.layers[0].mlp.down_proj.weight.shape[1] == 48


def test_models_without_a_plan_are_refused():
    import transformers as hf

    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, n_positions=64)
    model = hf.AutoModelForCausalLM.from_config(config)
    if any("rowwise" in style for style in (getattr(model, "_tp_plan", None) or {}).values()):
        pytest.skip("GPT-2 has a plan now")
    with pytest.raises(UnsupportedModelError, match="no plan for tensor parallelism"):
        divide(model, place(0))
    model = tp_families.model("llama")
    model._tp_plan = {**model._tp_plan, "model.norm": "spiral"}
    with pytest.raises(UnsupportedModelError, match="the style 'spiral'"):
        divide(model, place(0))
