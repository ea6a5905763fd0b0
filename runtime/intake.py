"""Checks of a request at the door. Each problem is a RequestError of one line; nothing else is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from llm42c.errors import RequestError
from llm42c.runtime.outputs import Limit
from llm42c.runtime.sampling import SamplingParams

MAX_TOKENS, CONTEXT, KV_CACHE = get_args(Limit)


@dataclass(frozen=True)
class Limits:
    """What a request of one engine may ask for."""

    vocab_size: int
    max_model_len: int
    num_pages: int
    page_size: int
    has_text: bool  # the engine can turn tokens into text


def check_prompt(prompt_ids: Sequence[int], limits: Limits) -> list[int]:
    """The prompt as plain ints. Raises RequestError if it is empty or holds anything but known token ids."""
    try:
        prompt = [int(t) for t in prompt_ids]
        exact = all(t == o and not isinstance(o, bool) for t, o in zip(prompt, prompt_ids, strict=True))
    except (TypeError, ValueError):
        exact = False
    if not exact:
        raise RequestError("the prompt must be a sequence of token ids")
    if not prompt:
        raise RequestError("the prompt is empty")
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        bad = next(t for t in prompt if not 0 <= t < limits.vocab_size)
        raise RequestError(f"token id {bad} is outside the vocabulary of {limits.vocab_size}")
    return prompt


def check_limits(prompt: list[int], params: SamplingParams, limits: Limits) -> tuple[int, Limit]:
    """How many tokens the request may generate, and what sets that number.

    `max_tokens=None` means what fits: up to the context, or to what the KV budget holds if that is less.
    Raises RequestError if the request cannot be served.
    """
    context = limits.max_model_len - len(prompt)
    cache = limits.num_pages * limits.page_size - len(prompt)
    max_tokens, limit = params.max_tokens, MAX_TOKENS
    if max_tokens is None:
        max_tokens, limit = (context, CONTEXT) if context <= cache else (max(cache, 1), KV_CACHE)
    if context < 1 or max_tokens > context:
        wanted = "at least 1" if params.max_tokens is None else params.max_tokens
        raise RequestError(
            f"{len(prompt)} prompt tokens and {wanted} new ones exceed the context of {limits.max_model_len}"
        )
    if params.min_tokens > max_tokens:
        raise RequestError(f"min_tokens ({params.min_tokens}) exceeds the {max_tokens} tokens that fit")
    if max_tokens > cache:
        pages = -(-(len(prompt) + max_tokens) // limits.page_size)
        remedy = "lower max_tokens or raise kv_cache_bytes" if cache > 0 else "raise kv_cache_bytes"
        raise RequestError(
            f"{len(prompt)} prompt tokens and {max_tokens} new ones need {pages} KV pages, the budget has "
            f"{limits.num_pages}; {remedy}"
        )
    for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        if any(t >= limits.vocab_size for t in ids):
            raise RequestError(f"{name} holds {max(ids)}, outside the vocabulary of {limits.vocab_size}")
    if params.stop and not limits.has_text:
        raise RequestError("stop strings need an engine with a tokenizer (decode=...)")
    return max_tokens, limit
