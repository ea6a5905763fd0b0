"""What a model takes by its configuration alone is what an engine allocates."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf

from llm42c.compile.compiler import ModelCompiler
from llm42c.runtime.plan.needs import of_model

FAMILIES = ("llama", "gemma2", "gpt2")


def _meta(family: str, dtype: torch.dtype) -> hf.PreTrainedModel:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(tiny.CONFIGS[family]()).to(dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_engine(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = of_model(_meta(family, dtype))
        model = tiny.model(family, dtype)
        assert found.weights == sum(p.untyped_storage().nbytes() for p in model.parameters())
        assert found.parameters == model.num_parameters()
    compiled = ModelCompiler(model).compile("pinned")
    cache = compiled.new_kv_cache(3, 16)
    assert found.kv_exact
    assert found.kv_per_token * 3 * 16 == sum(t.nbytes for t in (*cache.k, *cache.v))
