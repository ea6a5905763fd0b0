"""Tiny random decoders of several families, and packed batches for them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import transformers as hf
from torch import fx

from llm42c.capture.dynamo import CapturedGraph, capture_packed, new_kv_cache
from llm42c.codegen.ops import registry
from llm42c.passes.base import PACKED, Context, PositionInput

registry.load()

# Sizes that are no multiple of a vector, so that tails are always exercised.
_SIZES = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 40, "n_layer": 2, "n_head": 5, "vocab_size": 101, "n_positions": 96}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**_SIZES),
    "qwen2": lambda: hf.Qwen2Config(**_SIZES),
    "qwen3": lambda: hf.Qwen3Config(**_SIZES),
    "phi3": lambda: hf.Phi3Config(**_SIZES),
    "gemma2": lambda: hf.Gemma2Config(**_SIZES, sliding_window=8),
    "olmo2": lambda: hf.Olmo2Config(**_SIZES),
    "gpt2": lambda: hf.GPT2Config(**_GPT2, **_TOKENS),
}


def model(family: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    """A randomly initialised model; norms and biases are random too, so that a lost one is noticed."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    built = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1:
                noise = 0.3 * torch.randn(parameter.shape)
                parameter.copy_(noise if name.endswith("bias") else parameter + noise)
    return built.to(dtype)


def packed_context(captured: CapturedGraph, limit: int = 96) -> Context:
    placeholders = [n.name for n in captured.gm.graph.nodes if n.op == "placeholder"]
    position = placeholders[captured.inputs.index("positions")]
    return Context(target=PACKED, positions=PositionInput(position, limit))


def capture(built: Any) -> CapturedGraph:
    return capture_packed(built)


@functools.cache
def _captured_once(family: str, dtype: torch.dtype) -> tuple[Any, CapturedGraph]:
    built = model(family, dtype)
    return built, capture_packed(built)


def captured_copy(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, CapturedGraph]:
    """A model that must not be changed, and a capture of it that may be; Dynamo runs once a session."""
    built, captured = _captured_once(family, dtype)
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.gm.graph, {}))
    return built, dataclasses.replace(captured, gm=fx.GraphModule(captured.gm, graph))


def packed_arguments(captured: CapturedGraph, ids: torch.Tensor, dtype: torch.dtype) -> list[Any]:
    """One sequence ids [T] as a packed batch that wants all logits; fresh KV pages of 16."""
    tokens = ids.shape[0]
    cache = new_kv_cache(captured.kv_spec, 9, 16, dtype)
    values: dict[str, Any] = {
        "sym:T": tokens,
        "sym:R": tokens,
        "input_ids": ids[None],
        "positions": torch.arange(tokens)[None],
        "slot_mapping": torch.arange(tokens) + 16,
        "cu_seqlens_q": torch.tensor([0, tokens], dtype=torch.int32),
        "kv_lens": torch.tensor([tokens], dtype=torch.int32),
        "block_table": torch.arange(1, 9, dtype=torch.int32)[None],
        "logits_indices": torch.arange(tokens),
    }
    values |= {f"k_cache.{i}": t for i, t in enumerate(cache.k)}
    values |= {f"v_cache.{i}": t for i, t in enumerate(cache.v)}
    return [values[name] for name in captured.inputs]


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 101, shape, generator=torch.Generator().manual_seed(seed))
