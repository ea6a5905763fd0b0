"""A built engine's life: variants, and closing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from llm42c.errors import RequestError
from llm42c.runtime.loader import build_engine
from llm42c.runtime.sampling import SamplingParams

LIMITS: dict[str, Any] = {
    "num_pages": 24, "max_num_seqs": 4, "max_num_batched_tokens": 32, "persist_certificates": False,
}  # fmt: skip


def test_closing_closes_the_engine_and_its_variants_and_gives_the_model_back() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=40, intermediate_size=72, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=101, max_position_embeddings=96,
        )
    ).eval()  # fmt: skip
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        before = model(ids).logits
    built = build_engine(model, **LIMITS)
    variant = built.variant(num_pages=12)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for engine in (built.engine, variant):
        engine.submit([3, 1, 4], params)
        engine.step()
    built.close()
    for engine in (built.engine, variant):
        assert not engine.has_unfinished()
        assert engine.step() == []
        with pytest.raises(RequestError, match="closed"):
            engine.submit([3, 1, 4], params)
    built.close()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
