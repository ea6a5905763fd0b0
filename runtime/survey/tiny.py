"""A tiny random model of any decoder class of transformers: small sizes by the names of its fields.

A configuration keeps its defaults except where a field is known by its name (`_SIZES`); what a single class
needs besides stands in `NEEDS`. The default configuration says which kinds of layers a model mixes: the tiny
one has one layer of each kind, and at least two.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

VOCAB = 199
PAD, BOS, EOS = 0, 1, 2
_LAYERS = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_(encoder|decoder)_layers)"
)
_MIN_LAYERS, _MAX_LAYERS = 2, 4
_MAX_PARAMETERS = 20_000_000

# The first pattern that matches the whole name of an integer field gives its size.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|.*_vocab_size|vocab_size_per_layer_input|text_vocab_size", VOCAB),
    (r"hidden_size|n_embd|d_model|dim|emb_dim|embedding_size|word_embed_proj_dim|hidden_dim|lru_width", 64),
    (r".*moe.*intermediate_size|moe_.*ffn_.*|expert_.*intermediate_size|expert_ffn_hidden_size", 32),
    (r".*intermediate_size|.*ffn_dim|n_inner|d_ff|.*ffn_hidden_size|dim_ff|inner_dim|ffn_size", 96),
    (r"num_attention_heads|n_heads?|num_heads|.*_attention_heads|num_q_heads", 4),
    (r".*num_key_value_heads|num_kv_heads|n_head_kv", 2),
    (r"qk_rope_head_dim|rope_head_dim|rotary_dim", 8),
    (r".*head_dim|d_kv|attention_head_size|index_head_dim|mamba_d_head|head_v_dim|head_k_dim", 16),
    (r".*lora_rank|.*_rank|hidden_size_per_layer_input|laurel_rank", 16),
    (r"n_group", 2),
    (r"topk_group|n_shared_experts|num_shared_experts|moe_layer_freq", 1),
    (r".*num.*experts|n_routed_experts|.*_experts", 4),
    (r".*experts_per_tok|.*top_?k|moe_top_k|moe_k|num_experts_per_token", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length", 256),
    (r".*sliding_window|attention_window|attention_chunk_size|chunk_size|.*_chunk_size|window_size", 4),
    (r".*d_state|state_size|ssm_state_size", 16),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_ssm|d_inner", 128),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"pad_token_id", PAD),
    (r"bos_token_id|decoder_start_token_id", BOS),
    (r"eos_token_id|sep_token_id", EOS),
)

# What a class needs besides, with the reason where it is not plain.
NEEDS: dict[str, dict[str, Any]] = {
    "BigBirdConfig": {"attention_type": "original_full"},  # to which short inputs switch the other one
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Gemma4TextConfig": {"num_kv_shared_layers": 0},
    "Gemma4UnifiedTextConfig": {"num_kv_shared_layers": 0},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashConfig": {"head_dim": 8, "qk_head_dim": 24},  # of the rotated part, and of both parts
    "Mamba2Config": {"num_heads": 8},  # times head_dim: twice the hidden size
    "XmodConfig": {"default_language": "en_XX"},
    "CodeGenConfig": {"rotary_dim": 8},
    "GPTJConfig": {"rotary_dim": 8},
}


class CannotBuildError(Exception):
    """No tiny configuration of the class exists; the message says why, in one line."""


def _fields(config_class: type) -> dict[str, Any]:
    """Names and defaults of what a configuration takes."""
    parameters = inspect.signature(config_class.__init__).parameters.values()  # type: ignore[misc]
    named = (p for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD)
    return {p.name: p.default for p in named}


def _size(name: str, default: Any) -> int | None:
    """The small size of an integer field; a default of one (one key head, one group) is a property."""
    if default in (0, 1) and not name.endswith("_token_id"):
        return None
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return size
    return 3 if name.endswith("_token_id") and isinstance(default, int) and default >= VOCAB else None


def _sampled_layers(lists: list[list[Any]]) -> list[int]:
    """Places that show every value of every list, at least two, in ascending order."""
    length = len(lists[0])
    chosen: list[int] = []
    for values in lists:
        for value in dict.fromkeys(map(str, values)):
            if not any(str(values[i]) == value for i in chosen):
                chosen.append(next(i for i in range(length) if str(values[i]) == value))
    for i in range(length):
        if len(chosen) >= _MIN_LAYERS:
            break
        if i not in chosen:
            chosen.append(i)
    return sorted(chosen[:_MAX_LAYERS])


def _layer_fields(default: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Number of layers, and what the default configuration lists layer by layer, cut to it."""
    counts = [name for name in fields if _LAYERS.fullmatch(name)]
    depth = next((_of(default, n) for n in counts if isinstance(_of(default, n), int)), None)
    listed = {
        name: value
        for name in fields
        if isinstance(value := _of(default, name), (list, tuple)) and len(value) == depth
    }
    places = _sampled_layers([list(v) for v in listed.values()]) if listed else list(range(_MIN_LAYERS))
    cut = {name: [value[i] for i in places] for name, value in listed.items()}
    return {name: len(places) for name in counts} | cut


def _of(default: Any, name: str, otherwise: Any = None) -> Any:
    """A field of a default configuration; some have none that holds for all layers."""
    try:
        return getattr(default, name, otherwise)
    except Exception:
        return otherwise


def _default(config_class: type) -> Any:
    try:
        return config_class()
    except Exception:
        return None


def tiny_fields(config_class: type) -> dict[str, Any]:
    """Arguments for a small configuration of the class; sub-configurations as dictionaries."""
    fields = _fields(config_class)
    default = _default(config_class)
    chosen: dict[str, Any] = {}
    for name, given in fields.items():
        effective = _of(default, name, given)
        size = None if isinstance(effective, (bool, float, str, list, dict)) else _size(name, effective)
        if size is not None and (effective is not None or name.endswith("_token_id") or "head" in name):
            chosen[name] = size
        if name == "is_decoder":
            chosen[name] = True
        if name in ("initializer_range", "init_std", "initializer_std"):
            chosen[name] = 0.1
    if default is not None:
        chosen |= _layer_fields(default, fields)
    for name, inner in (getattr(config_class, "sub_configs", None) or {}).items():
        if inner.__name__ != "AutoConfig":
            chosen[name] = tiny_fields(inner)
    if "kv_lora_rank" in fields and "num_key_value_heads" in chosen:  # latent keys are expanded to all heads
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    chosen |= NEEDS.get(config_class.__name__, {})
    return chosen


def tiny_config(config_class: type) -> Any:
    """A small configuration. Raises CannotBuildError."""
    try:
        return config_class(**tiny_fields(config_class))
    except Exception as error:
        raise CannotBuildError(f"its configuration: {one_line(error)}") from error


def tiny_model(model_class: Any, config_class: type, dtype: torch.dtype, seed: int = 0) -> Any:
    """A random model in eval mode, the same for the same arguments. Raises CannotBuildError."""
    config = tiny_config(config_class)
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(config).parameters())
    except Exception:
        count = 0  # some classes compute with their weights while they are built
    if count > _MAX_PARAMETERS:
        raise CannotBuildError(f"its smallest known configuration has {count:,} parameters")
    torch.manual_seed(seed)
    try:
        model = model_class(config).eval()
    except Exception as error:
        raise CannotBuildError(one_line(error)) from error
    _randomise(model)
    return model.to(dtype)


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Weights of a sane scale: what starts small is drawn larger, and what starts constant is spread.

    Norm weights of one, biases of zero and matrices of 0.02 would hide mistakes.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() < 2:
            continue
        spread = parameter.float().std().item()
        if not torch.isfinite(parameter).all():
            parameter.normal_(0.0, 0.1)
        elif spread < 1e-6:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif parameter.dim() >= 2 and spread < 0.08:
            parameter.mul_(0.1 / spread)


def one_line(error: BaseException) -> str:
    """The first line of an error with its type, at most 160 characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".strip().rstrip(":")
    return text if len(text) <= 160 else text[:157] + "..."
