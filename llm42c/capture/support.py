"""Which models can be served at all: every refusal is one line that names the reason.

These are the reasons that can be seen before a capture. A model that passes may still be refused by the
capture itself, for an attention that is neither causal nor a sliding window, or not provably so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llm42c import quantised
from llm42c.errors import UnsupportedModelError

_PAGE = "docs/huggingface.md#which-decoders-are-served"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})
_OTHER_INPUTS = ("vision_config", "audio_config", "speech_config", "image_config", "video_config")
# Their tables depend on the longest sequence of the batch, so a row would depend on its neighbours.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def unsupported(model: nn.Module, reason: str, page: str = _PAGE) -> UnsupportedModelError:
    """The refusal of a model, in one line: its class, the construct, and what to read."""
    return UnsupportedModelError(f"{type(model).__name__} is not supported: {reason}; see {page}")


def require_supported(model: nn.Module) -> None:
    """Raise UnsupportedModelError, in one line, if ``model`` cannot be made deterministic."""
    for reason in _reasons(model):
        raise unsupported(model, reason)


def context_limit(model: nn.Module) -> int:
    """The number of positions that a model has, by whatever name its configuration calls it.

    A model without positions of its own (linear biases) has as many as it was trained for, else 2048.
    """
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    for name in ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return 2048


def layer_config(config: Any, layer: int) -> Any:
    """The configuration of one layer, where layers differ; else the configuration itself."""
    each = getattr(config, "per_layer_config", None)
    return config if each is None else each[layer]


def _reasons(model: nn.Module) -> Iterator[str]:
    config: Any = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "generate", None)):
        yield "it is not a Hugging Face model with a generate method"
        return
    if getattr(config, "is_encoder_decoder", False):
        yield "encoder-decoder models attend to an encoder's output; only decoders are served"
    for name in _OTHER_INPUTS:
        if getattr(config, name, None) is not None:
            yield f"it takes more than text ({name}); load its text model alone"
    if getattr(model, "_is_stateful", False):
        yield "its layers keep a recurrent state (Mamba, linear attention) besides keys and values"
    text = config.get_text_config(decoder=True)
    yield from _layer_reasons(text)
    yield from _weight_reasons(model, config)
    layers = getattr(text, "num_hidden_layers", None)
    if layers is None or getattr(layer_config(text, 0), "num_attention_heads", None) is None:
        yield "its configuration names no attention heads or layers"


def _layer_reasons(config: Any) -> Iterator[str]:
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in _ATTENTION_LAYERS:
            yield f"its layers of type {kind!r} are not causal or sliding-window attention"
    if getattr(config, "is_causal", True) is False:
        yield "its attention is not causal"
    rope = getattr(config, "rope_parameters", None) or {}
    groups = [rope, *(g for g in rope.values() if isinstance(g, dict))]
    for kind in {g.get("rope_type") for g in groups} & _BATCH_DEPENDENT_ROPE:
        yield f"rope_type {kind!r} rotates a token by what else is in its batch; set another rope_parameters"


def _weight_reasons(model: nn.Module, config: Any) -> Iterator[str]:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = getattr(quantization, "quant_method", None)
        if method is None and isinstance(quantization, dict):
            method = quantization.get("quant_method", "unknown")
        if method != quantised.METHOD and not _is_dequantized(quantization):
            yield f"its weights are quantised ({getattr(method, 'value', method)}); load it dequantised"
    seen, places = set(), set()
    blocks = {id(m.weight) for m in model.modules() if isinstance(m, quantised.Quantised)}
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor:
            yield f"weight {name} is a {type(parameter.data).__name__}; load the model dequantised"
            return
        if parameter.is_meta:
            yield f"weight {name} holds no data (meta device)"
            return
        places.add(str(parameter.device))
        if id(parameter) not in blocks:
            seen.add(parameter.dtype)
    if len(places) > 1:
        yield f"its weights are spread over {', '.join(sorted(places))}; all must lie on one device"
    if not seen:
        yield "it has no parameters"
    elif len(seen) > 1 or not seen <= set(DTYPES):
        found = ", ".join(sorted(str(d).removeprefix("torch.") for d in seen))
        yield f"its weights are {found}; all must be one of float32, bfloat16, float16"


def _is_dequantized(quantization: Any) -> bool:
    """GGUF and other checkpoints can be loaded with ``dequantize=True``: then the weights are ordinary."""
    if isinstance(quantization, dict):
        return bool(quantization.get("dequantize", False))
    return bool(getattr(quantization, "dequantize", False))
