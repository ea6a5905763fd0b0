"""Checkpoints as they are loaded: GGUF dequantised, quantised weights, tied embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ENGINE, PAD, VOCAB, assert_rows, make, padded, prompt, solo
from transformers import AutoModelForCausalLM, GgufConfig

import llm42c
from llm42c.errors import UnsupportedModelError

PROMPTS = [prompt(5, 1), prompt(12, 2)]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers in Q8_0, as `model.gguf`."""
    gguf = pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = (0.1 * random.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCAB, 64)
    add("output_norm.weight", 64)
    for layer in range(2):
        for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)):
            add(f"blk.{layer}.{name}.weight", rows, 64)
        add(f"blk.{layer}.ffn_gate.weight", 96, 64)
        add(f"blk.{layer}.ffn_up.weight", 96, 64)
        add(f"blk.{layer}.ffn_down.weight", 64, 96)
        add(f"blk.{layer}.attn_norm.weight", 64)
        add(f"blk.{layer}.ffn_norm.weight", 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gguf_dequantised(gguf_folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), dtype=dtype
    )
    expected = model.generate(torch.tensor(PROMPTS[:1]), **GREEDY)
    llm42c.deterministic(model, **ENGINE)
    alone = solo(model, PROMPTS, **GREEDY)
    out = model.generate(**padded(PROMPTS), **GREEDY, return_dict_in_generate=True)
    assert_rows(out, 12, alone)
    if dtype == torch.float32:
        assert alone[0][0] == expected[0, 5:].tolist()


def test_gguf_as_it_is_refused(gguf_folder: Path) -> None:
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="model.gguf")
    except (ImportError, ValueError) as error:
        pytest.skip(f"transformers does not load it: {error}")
    if any(type(p.data) is not torch.Tensor or p.dtype == torch.uint8 for p in model.parameters()):
        with pytest.raises(UnsupportedModelError, match="dequantised"):
            llm42c.deterministic(model, **ENGINE)


def test_torchao_int8_is_refused() -> None:
    """Its product is another kernel for few rows than for many."""
    quantization = pytest.importorskip("torchao.quantization")
    model = make("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedModelError, match="load the model dequantised") as caught:
        llm42c.deterministic(model, **ENGINE)
    assert "\n" not in str(caught.value)


def test_quantised_weights_are_refused() -> None:
    class Int8(torch.Tensor):
        pass

    model = make("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.as_subclass(Int8))
    with pytest.raises(UnsupportedModelError, match="Int8; load the model dequantised"):
        llm42c.deterministic(model)
    model = make("llama")
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(UnsupportedModelError, match=r"quantised \(torchao\)"):
        llm42c.deterministic(model)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not(tied: bool, tmp_path: Path) -> None:
    model = make("llama", torch.bfloat16, tie_word_embeddings=tied)
    expected = {name: p.clone() for name, p in model.named_parameters()}
    llm42c.deterministic(model, **ENGINE)
    alone = solo(model, PROMPTS, **GREEDY)
    assert_rows(model.generate(**padded(PROMPTS), **GREEDY, return_dict_in_generate=True), 12, alone)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    llm42c.deterministic.undo(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert {name: id(p) for name, p in model.named_parameters()}.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
