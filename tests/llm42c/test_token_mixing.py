"""Latent attention, convolutions along time and recurrent states have an order in a user's own model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import fx

from llm42c.backend import rewrite_plain
from llm42c.compile.dump import Dump
from llm42c.options import Options
from llm42c.passes.base import Report

LENGTH, ROWS = 11, 4
_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES: dict[str, Any] = {
    # Latent attention, groups of experts.
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **_SIZES,
        **_EXPERTS,
        **_LATENT,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    # Short convolutions beside attention.
    "lfm2": lambda: hf.Lfm2Config(
        **_SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"], block_ff_dim=72
    ),
    # The gated delta rule in chunks: convolution, running sums, triangular systems; experts.
    "qwen3_next": lambda: hf.Qwen3NextConfig(
        **_SIZES,
        **_EXPERTS,
        **_LINEAR,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
    ),
}

PASSES = {
    "deepseek_v3": {"attention_sdpa", "grouped_mm"},
    "lfm2": {"attention_sdpa", "conv1d"},
    "qwen3_next": {"attention_sdpa", "conv1d", "grouped_mm", "solve_triangular", "reductions"},
}


def _model(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    built = hf.AutoModelForCausalLM.from_config(FAMILIES[family](), **settings).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(parameter + 0.05 * torch.randn(parameter.shape))
    return built.to(dtype)


def _rewritten(reports: list[Report], gm: fx.GraphModule, inputs: list[Any], *, options: Any) -> Any:
    """The backend up to Inductor."""
    reports.append(rewrite_plain(gm, inputs, Options.parse(options), Dump(None, "plain")))
    return gm


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_has_an_order(family: str) -> None:
    """``strict`` takes the model, and its logits are eager's but for the rounding of fp32."""
    ids = torch.randint(3, 101, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    built, reports = _model(family), []
    torch._dynamo.reset()
    backend = functools.partial(_rewritten, reports)
    compiled = torch.compile(built, backend=backend, dynamic=True, options={"strict": True})
    with torch.no_grad():
        logits = compiled(input_ids=ids, use_cache=False).logits
        eager = built(input_ids=ids, use_cache=False).logits
    assert [event for report in reports for event in report.unplaced] == []
    matched = {p.name for report in reports for p in report.passes if p.matches}
    assert PASSES[family] <= matched
    assert (logits - eager).abs().max() <= 200 * 2.0**-24 * eager.abs().max()
    assert not torch.equal(logits, eager)
