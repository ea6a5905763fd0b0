"""Tiny random models of every family, a tokenizer for them, and Hugging Face eager as the yardstick."""

from __future__ import annotations

import functools
import string
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llm42c.runtime.survey.cells import ENGINE as ENGINE

VOCAB = 199
PAD, BOS, EOS = 0, 1, 2
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_LOCAL_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 16}
_MOE = {"num_experts_per_tok": 2, "head_dim": 16}
_GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": VOCAB,
    "initializer_range": 0.1,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_NEOX = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
_GRANITE = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 3.0,
    "attention_multiplier": 0.2,
}

# family: (model class, configuration class, what it adds to the common configuration)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _LOCAL_GLOBAL),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", _GRANITE),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NEOX),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _MOE | {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _MOE | {"num_experts": 4, "moe_intermediate_size": 32},
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", _LOCAL_GLOBAL | _MOE | {"num_local_experts": 4}),
}


def make(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **extra: Any) -> PreTrainedModel:
    """A random model of the family, the same for the same arguments."""
    model_name, config_name, added = FAMILIES[family]
    base = {} if family in ("gpt2", "gpt_neox") else _COMMON
    config = getattr(transformers, config_name)(**(base | added | extra))
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config).to(dtype).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide mistakes
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                offset = 0.0 if "bias" in name or family.startswith("gemma") else 1.0
                parameter.copy_(offset + 0.1 * torch.randn(parameter.shape))
    return model


@functools.cache
def plain(family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Hugging Face eager."""
    return make(family, dtype)


@functools.cache
def wrapped(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """The same model, deterministic; shared by the whole session."""
    import llm42c

    return llm42c.deterministic(make(family, dtype), **ENGINE)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One character a token, then pairs of letters."""
    letters = [*string.ascii_letters, *string.digits, " ", ".", ","]
    pairs = [(a, b) for a in string.ascii_lowercase for b in string.ascii_lowercase][
        : VOCAB - 3 - len(letters)
    ]
    pieces = ["<pad>", "<s>", "</s>", *letters, *(a + b for a, b in pairs)]
    inner = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, pairs))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, W]."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for i, p in enumerate(prompts):
        place = slice(width - len(p), width) if side == "left" else slice(0, len(p))
        ids[i, place] = torch.tensor(p)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


def solo(model: Any, prompts: list[list[int]], **arguments: Any) -> list[tuple[list[int], list[int]]]:
    """Each prompt alone: new tokens, and the bits of their log-probs."""
    found = []
    for p in prompts:
        ids = torch.tensor([p])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **arguments
        )
        for row, logprobs, n in zip(out.sequences, out.logprobs, out.lengths.tolist(), strict=True):
            found.append((row[len(p) : len(p) + n].tolist(), bits(logprobs)[:n].tolist()))
    return found


def assert_rows(out: Any, width: int, expected: list[tuple[list[int], list[int]]]) -> None:
    """Each row of a batch is its solo run, bit for bit, and then padding."""
    new, logprobs = out.sequences[:, width:], bits(out.logprobs)
    assert out.lengths.tolist() == [len(tokens) for tokens, _ in expected]
    for i, (tokens, values) in enumerate(expected):
        assert new[i, : len(tokens)].tolist() == tokens, f"row {i}"
        assert logprobs[i, : len(tokens)].tolist() == values, f"row {i}"
        assert (new[i, len(tokens) :] == PAD).all()
        assert (logprobs[i, len(tokens) :] == 0).all()


def assert_like_eager(
    ours: torch.Tensor, model: Any, inputs: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """The same tokens as Hugging Face eager.

    Two tokens whose processed scores differ by less than the rounding of fp32 logits are no difference; what
    a row says after such a tie is not compared.
    """
    theirs = model.generate(
        **inputs, **arguments, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    width = inputs["input_ids"].shape[1]
    assert ours.shape[0] == theirs.sequences.shape[0]
    tied = False
    for i, (mine, other) in enumerate(zip(ours, theirs.sequences, strict=True)):
        for t in range(width, min(len(mine), len(other))):
            if mine[t] == other[t]:
                continue
            scores = theirs.scores[t - width][i]
            gap = (scores[other[t]] - scores[mine[t]]).item()
            assert 0 <= gap <= tie_bound(scores), f"row {i}, output {t - width}: {mine[t]} != {other[t]}"
            tied = True
            break
    assert tied or ours.shape == theirs.sequences.shape


def tie_bound(scores: torch.Tensor) -> float:
    """How far rounding can move two logits apart: 2 layers of sums over <= 96 products, error n·eps each."""
    finite = scores[torch.isfinite(scores)]
    return 2 * 2 * 7 * 96 * torch.finfo(torch.float32).eps * max(1.0, finite.abs().max().item())
