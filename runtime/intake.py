"""Checks of a request at the door. Each problem is a RequestError of one line; nothing else is touched."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, get_args

from llm42c.errors import RequestError
from llm42c.runtime.outputs import Limit
from llm42c.runtime.sampling import SamplingParams, shown

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
    # Measured before it is read: a range or a mapped file may be longer than memory.
    length = _length(prompt_ids)
    if length > limits.max_model_len:
        raise RequestError(f"{length} prompt tokens exceed the context of {limits.max_model_len}")
    prompt = check_tokens("the prompt", prompt_ids, limits.vocab_size)
    if not prompt:
        raise RequestError("the prompt is empty")
    return prompt


def check_tokens(what: str, ids: Any, vocab_size: int, most: int | None = None) -> list[int]:
    """The first `most` of `ids` as plain ints. Raises RequestError, naming `what`, for anything but known
    token ids."""
    if isinstance(ids, str | bytes | bytearray | Mapping | Set):
        raise RequestError(f"{what} must be a sequence of token ids, not {type(ids).__name__}")
    try:
        tokens = [_token_id(t) for t in itertools.islice(iter(ids), most)]
    except Exception:  # whatever a caller's own sequence raises is its caller's mistake
        raise RequestError(f"{what} must be a sequence of token ids") from None
    bad = next((t for t in tokens if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise RequestError(f"token id {shown(bad)} is outside the vocabulary of {vocab_size}")
    return tokens


def _length(prompt_ids: Sequence[int]) -> int:
    """0 for what has no length."""
    try:
        return len(prompt_ids)
    except OverflowError:
        return sys.maxsize
    except Exception:
        return 0


def _token_id(token: Any) -> int:
    """An integer of Python, NumPy or torch. Raises TypeError for anything that only looks like one."""
    if type(token) is int:
        return token
    kind, dims = str(getattr(token, "dtype", "")), getattr(token, "ndim", None)
    if isinstance(token, bool) or "bool" in kind or dims not in (None, 0):
        raise TypeError
    return operator.index(token)


def check_id(request_id: Any) -> str:
    """`request_id` if it can be one. Raises RequestError."""
    if not isinstance(request_id, str) or not request_id or not request_id.isprintable():
        raise RequestError(f"request_id must be a non-empty printable string, not {shown(request_id)}")
    return request_id


def check_flag(name: str, value: Any) -> None:
    """Raises RequestError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be True or False, not {shown(value)}")


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
            raise RequestError(
                f"{name} holds {shown(max(ids))}, outside the vocabulary of {limits.vocab_size}"
            )
    if params.stop and not limits.has_text:
        raise RequestError("stop strings need an engine with a tokenizer (decode=...)")
    return max_tokens, limit
