"""Models that Hugging Face divides by its plan, under ``torch.compile``: every site of every family.

The process group is a fake one: graphs and shapes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import tp_families
import transformers as hf
from torch import fx
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from llm42c.codegen.ops import registry
from llm42c.passes import graph as g
from llm42c.passes import pipeline
from llm42c.passes.base import Context, Report


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    registry.load()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def divided(family: str, folder: Path) -> Any:
    """The model as ``from_pretrained`` with a plan gives it: parameters are DTensors."""
    distributed = pytest.importorskip("transformers.distributed")
    tp_families.model(family).save_pretrained(folder)
    config = distributed.DistributedConfig(tp_size=2)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.bfloat16)
    assert isinstance(model.model.layers[0].self_attn.o_proj.weight, DTensor)
    return model.eval()


def rewritten(model: Any) -> tuple[fx.GraphModule, Report]:
    caught: list[fx.GraphModule] = []

    def grab(gm: fx.GraphModule, examples: list[Any]) -> Any:
        caught.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=grab, fullgraph=True)(
            torch.zeros(1, 6, dtype=torch.long), use_cache=False
        )
    return caught[0], pipeline.run(caught[0], Context())


@pytest.mark.slow
@pytest.mark.parametrize("family", tp_families.CONFIGS)
def test_every_site_of_every_family(family: str, tmp_path: Path):
    gm, report = rewritten(divided(family, tmp_path))
    calls = [g.name(n) for n in gm.graph.nodes]
    sites = 2 * tp_families.LAYERS
    assert len(report["collectives"].matches) == sites
    assert not report["collectives"].misses
    assert "copy_" not in calls
    fused = report["allreduce_rmsnorm"]
    if family in tp_families.FUSED:
        assert calls.count("llm42::all_reduce_add_rms_norm") == len(fused.matches) == sites
        assert not fused.misses
    else:
        assert calls.count("llm42::all_reduce") == len(fused.misses) == sites
        assert all(tp_families.REASONS[family] in miss.reason for miss in fused.misses)
    assert not [
        event for event in report.unplaced if "redistribute" in event.reason or "c10d" in event.reason
    ]
