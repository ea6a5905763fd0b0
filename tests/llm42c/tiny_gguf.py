"""A GGUF file of a tiny random Llama whose weights have the formats that one asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf: Any = pytest.importorskip("gguf")
VOCAB, WIDTH, INNER, HEADS, KV_HEADS, LAYERS = 260, 256, 512, 4, 2, 2
# As real files mix: K-quants where 256 divides a row, and what v and the embedding get.
MIXED = {"token_embd": "q8_0", "attn_q": "q4_k", "attn_k": "q5_k", "attn_v": "q6_k", "ffn_down": "q5_1"}


def quantised(values: np.ndarray, format: str) -> np.ndarray:
    """[n, k] fp32 → blocks. The package quantises no K-quants: theirs are drawn, of about the same size."""
    kind = gguf.GGMLQuantizationType[format.upper()]
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        random = np.random.default_rng(values.size)
        blocks = random.integers(0, 256, (len(values), values.shape[1] // size, nbytes), dtype=np.uint8)
        scale = np.array([2e-4], dtype=np.float16).view(np.uint8)
        for at in [208] if format == "q6_k" else [0, 2]:
            blocks[..., at : at + 2] = scale
        return blocks.reshape(len(values), -1)


def write(path: Path, formats: dict[str, str] | None = None, other: str = "q4_0") -> Path:
    """``formats``: of tensors by name without layer; the rest has ``other``."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    byte = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]
    tokens = [chr(c) for c in byte][:256]
    writer.add_token_list([*tokens, "<s>", "</s>", "Ġt", "he"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)

    def add(name: str, *shape: int) -> None:
        values = (0.1 * random.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        if len(shape) == 1:
            return writer.add_tensor(name, values)
        plain = name.removesuffix(".weight").split(".")[-1]
        format = (formats or {}).get(plain, other)
        if format == "f32":
            return writer.add_tensor(name, values)
        kind = gguf.GGMLQuantizationType[format.upper()]
        return writer.add_tensor(name, quantised(values, format), raw_dtype=kind)

    add("token_embd.weight", VOCAB, WIDTH)
    add("output_norm.weight", WIDTH)
    kv = WIDTH * KV_HEADS // HEADS
    for layer in range(LAYERS):
        for name, rows in (("attn_q", WIDTH), ("attn_k", kv), ("attn_v", kv), ("attn_output", WIDTH)):
            add(f"blk.{layer}.{name}.weight", rows, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", INNER, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, INNER)
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
