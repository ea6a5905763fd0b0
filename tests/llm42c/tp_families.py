"""Tiny decoders of the families with a tensor-parallel plan, and how often each can be fused."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

LAYERS = 1
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2}

CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**_SIZES),
    "qwen2": lambda: hf.Qwen2Config(**_SIZES),
    "qwen3": lambda: hf.Qwen3Config(**_SIZES),
    "mistral": lambda: hf.MistralConfig(**_SIZES),
    "phi3": lambda: hf.Phi3Config(**_SIZES),
    "mixtral": lambda: hf.MixtralConfig(**_SIZES, **_EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_SIZES, **_EXPERTS, num_experts=4, moe_intermediate_size=16),
    "gemma2": lambda: hf.Gemma2Config(**_SIZES, sliding_window=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**_SIZES, sliding_window=8),
    "olmo2": lambda: hf.Olmo2Config(**_SIZES),
    "granite": lambda: hf.GraniteConfig(**_SIZES, residual_multiplier=0.5),
}
# Two sites a layer: after the attention and after the MLP.
FUSED = ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe")
REASONS = {
    "gemma2": "normed before the residual",
    "gemma3": "normed before the residual",
    "olmo2": "normed before the residual",
    "granite": "scaled before the residual",
}


def model(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Random weights; norms and biases random too, so that a lost one is noticed."""
    torch.manual_seed(0)
    built = hf.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1:
                noise = 0.3 * torch.randn(parameter.shape)
                parameter.copy_(noise if name.endswith("bias") else parameter + noise)
    return built.to(dtype)
