"""What of `generate`'s arguments can be kept, and the prompts as rows of their own.

Everything that cannot be kept is refused here, by name, before anything runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from llm42c.errors import RequestError
from llm42c.runtime.drafters import DraftModel
from llm42c.runtime.sampling import MAX_SEED

_Test = Callable[[Any], bool]


def _given(value: Any) -> bool:
    return value is not None


# Entries of a generation config: when they are refused, and as what.
_REFUSED_SETTINGS: dict[str, tuple[_Test, str]] = {
    "num_beams": (lambda v: v is not None and v > 1, "beam search"),
    "num_beam_groups": (lambda v: v is not None and v > 1, "group beam search"),
    "penalty_alpha": (lambda v: v is not None and v > 0, "contrastive search"),
    "dola_layers": (_given, "DoLa decoding"),
    "constraints": (_given, "constrained beam search"),
    "force_words_ids": (_given, "constrained beam search"),
    "guidance_scale": (lambda v: v is not None and v != 1, "classifier-free guidance"),
    "assistant_early_exit": (_given, "assisted decoding"),
    "token_healing": (bool, "token healing"),
    "output_attentions": (bool, "attention weights"),
    "output_hidden_states": (bool, "hidden states"),
    "cache_implementation": (lambda v: v in ("quantized", "paged"), "this cache"),
}
# Arguments of the call itself.
_REFUSED_ARGUMENTS = {
    "assistant_tokenizer": "assisted decoding with another vocabulary",
    "negative_prompt_ids": "classifier-free guidance",
    "negative_prompt_attention_mask": "classifier-free guidance",
    "inputs_embeds": "a prompt given as embeddings (pass input_ids)",
    "encoder_outputs": "encoder outputs",
    "custom_generate": "another decoding loop",
    "synced_gpus": "synchronised GPUs",
}
_KNOWN_MODEL_KWARGS = frozenset(
    {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position"}
)
# Releases of transformers name the input differently; a cache of any name is known by its type.
_CACHE_ARGUMENTS = frozenset({"cache", "past_key_values", "cache_params"})


def require_supported(arguments: dict[str, Any], *configs: Any) -> None:
    """Raise RequestError, naming the argument, if a call asks for what cannot be kept.

    `arguments`: of the call. `configs`: generation configs, in order of precedence.
    """
    for name, what in _REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None and arguments[name] is not False:
            raise RequestError(f"{name}: {what} is not supported by a deterministic model")
    for name, value in arguments.items():
        if isinstance(value, Cache) or (name in _CACHE_ARGUMENTS and value is not None):
            raise RequestError(
                f"{name}: a cache of the caller is not supported by a deterministic model "
                "(pass the whole prompt: its prefix is cached by the engine)"
            )
    for name, (test, what) in _REFUSED_SETTINGS.items():
        if test(effective(name, arguments, *configs)):
            raise RequestError(f"{name}: {what} is not supported by a deterministic model")


def prompt_lookup(arguments: dict[str, Any], *configs: Any) -> int | None:
    """`prompt_lookup_num_tokens`: how long drafts from a row's own text may be. Raises RequestError."""
    count = effective("prompt_lookup_num_tokens", arguments, *configs)
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise RequestError(f"prompt_lookup_num_tokens must be a positive integer, not {count!r}")
    return count


def assistant_of(model: Any, arguments: dict[str, Any]) -> DraftModel | None:
    """`assistant_model`, which is taken out: a model that drafts. Raises RequestError unless its vocabulary
    is the model's."""
    assistant = arguments.pop("assistant_model", None)
    if assistant is None:
        return None
    if not isinstance(assistant, PreTrainedModel):
        raise RequestError(f"assistant_model must be a Hugging Face model, not a {type(assistant).__name__}")
    if assistant is model:
        raise RequestError("assistant_model: a model cannot assist itself; speculate='self' quantises it")
    sizes = [int(m.config.get_text_config(decoder=True).vocab_size) for m in (assistant, model)]
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"assistant_model: its vocabulary must be the model's: it has {sizes[0]} tokens, not {sizes[1]}"
        )
    return DraftModel(assistant)


def require_batch(arguments: dict[str, Any]) -> None:
    """Raise RequestError unless the prompts, if there are any, are a tensor of token ids [B, W]."""
    for name in ("inputs", "input_ids"):
        value = arguments.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            hint = "; generate_batch takes lists" if isinstance(value, (list, tuple)) else ""
            raise RequestError(
                f"{name} must be a tensor of token ids [B, W], not a {type(value).__name__}{hint}"
            )
        if value.dim() != 2:
            hint = ": one prompt is input_ids.unsqueeze(0)" if value.dim() == 1 else ""
            raise RequestError(f"{name} must be a batch of prompts [B, W], not {list(value.shape)}{hint}")
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise RequestError(f"{name} must hold token ids, not {value.dtype}")


def effective(name: str, arguments: dict[str, Any], *configs: Any) -> Any:
    """The value of a generation setting: of the call, else of the first config that sets it."""
    if name in arguments:
        return arguments[name]
    values = (getattr(config, name, None) for config in configs if config is not None)
    return next((value for value in values if value is not None), None)


def require_known(model_kwargs: dict[str, Any]) -> None:
    """Raise RequestError for inputs of the model that a packed batch does not have.

    The cache that `generate` prepared is left aside: the engine has its own.
    """
    for name, value in model_kwargs.items():
        if name not in _KNOWN_MODEL_KWARGS and value is not None and not isinstance(value, Cache):
            raise RequestError(f"{name}: this input of the model is not supported by a deterministic model")


def rows_of(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> list[list[int]]:
    """The prompts without their padding, on whichever side it is.

    input_ids, attention_mask: [B, W]. A masked token inside a prompt is dropped: it is attended by nothing
    and counts in no position. Raises RequestError for an empty row or unusual positions.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise RequestError(
            f"attention_mask {list(attention_mask.shape)} does not fit input_ids {list(input_ids.shape)}"
        )
    ids = input_ids.tolist()
    keep = [[True] * len(row) for row in ids] if attention_mask is None else attention_mask.bool().tolist()
    rows = [[t for t, k in zip(row, mask, strict=True) if k] for row, mask in zip(ids, keep, strict=True)]
    for i, row in enumerate(rows):
        if not row:
            raise RequestError(f"row {i} of the batch holds no token")
    if position_ids is not None and position_ids.dim() == 2:
        positions = position_ids.expand(len(ids), -1).tolist()
        for i, (place, mask) in enumerate(zip(positions, keep, strict=True)):
            if [p for p, k in zip(place, mask, strict=True) if k] != list(range(len(rows[i]))):
                raise RequestError(f"position_ids: row {i} does not count from 0; this is not supported")
    return rows


def row_seeds(seed: Any, prompts: int, copies: int) -> list[int]:
    """A seed for each of `prompts * copies` rows, the copies of a prompt side by side.

    `seed` is one number for all prompts, or a sequence with one for each. The first copy of a prompt takes
    its seed as it is, and copy i the first 63 bits of BLAKE2b over "seed/i": a row's seed depends on nothing
    else. Raises RequestError.
    """
    if hasattr(seed, "tolist"):  # a tensor, an array or a number of NumPy's
        seed = seed.tolist()
    each = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed] * prompts
    if len(each) != prompts:
        raise RequestError(f"seed: {len(each)} seeds for {prompts} prompts")
    for value in each:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SEED:
            raise RequestError(f"seed must be an integer in [0, 2^63), not {value!r}")
    return [_copy_seed(value, i) for value in each for i in range(copies)]


def _copy_seed(seed: int, copy: int) -> int:
    if copy == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{copy}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & MAX_SEED
