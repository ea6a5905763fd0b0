"""What the engine hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llm42c.runtime.receipt import Receipt
    from llm42c.runtime.request import Request

FinishReason = Literal["stop", "length", "error"]
# What bounds the length of an output: the request's own max_tokens; without one, the model's context, or the
# pages for keys and values where they hold less than a context.
Limit = Literal["max_tokens", "context", "kv_cache"]
TopLogprobs = list[tuple[int, float]]  # (token id, log-prob), most likely first, ties by token id


@dataclass(slots=True)
class RequestOutput:
    """News of one request after a step.

    `new_*` extend what earlier outputs delivered and are never taken back. The complete `token_ids`,
    `logprobs`, `top_logprobs` and `text` are filled in the output that has `finished` set. Log-probs are
    exact float32 values.
    """

    request_id: str
    new_token_ids: list[int]
    new_logprobs: list[float]
    new_top_logprobs: list[TopLogprobs] | None = None
    new_text: str = ""
    finished: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the token id or string that ended it
    limit: Limit | None = None  # which limit ended it, if `finish_reason` is "length"
    error: str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] | None = None
    text: str = ""
    receipt: Receipt | None = None  # when it was asked for


def news_of(request: Request, finished: bool) -> RequestOutput:
    """What the user has not been given yet; from here on it counts as delivered."""
    history, delivery = request.history, request.delivery
    done, tops = delivery.outputs, request.params.logprobs is not None
    output = RequestOutput(
        request.id,
        history.tokens[request.prompt_len + done :],
        history.logprobs[done:],
        history.tops[done:] if tops else None,
    )
    delivery.outputs = max(done, request.num_outputs)
    if finished:
        output.new_text = delivery.text[delivery.characters :]
        output.finished = True
        output.finish_reason = request.finish_reason
        output.stop_reason = request.stop_reason
        output.limit = request.limited_by if request.finish_reason == "length" else None
        output.error = request.error
        output.prompt_token_ids = history.tokens[: request.prompt_len]
        output.token_ids = request.outputs
        output.logprobs = history.logprobs
        output.top_logprobs = history.tops if tops else None
        output.text = delivery.text
    elif history.text is not None:
        shown = history.text.safe_length()
        output.new_text = history.text.text[delivery.characters : shown]
        delivery.characters = max(delivery.characters, shown)
    return output
