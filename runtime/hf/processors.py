"""Hugging Face's logits processors, one row at a time.

A processor is called with the row's own tokens, without padding and without the other rows ([1, n] and
[1, V]), so that what it does cannot depend on the batch. It may be called on proposals that are thrown away
later, and again on the same prefix: it must be a pure function of its two arguments. One that is not (it
draws random numbers, counts its calls, keeps a state of its own) is found by calling it twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from llm42c.errors import RequestError

# These are executed by the sampling operator when they stand last, in this order: same sets of tokens.
_NATIVE = (hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper)
_REFUSED = {
    "SynthIDTextWatermarkLogitsProcessor": "it keeps a state of earlier calls",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "it runs the model itself",
    "ClassifierFreeGuidanceLogitsProcessor": "it needs a second row of the batch",
    "WhisperNoSpeechDetection": "it runs the model itself",
}


@dataclass(frozen=True)
class Sampling:
    """The part of a processor list that the sampling operator does itself. `temperature` 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def split(processors: Sequence[Any], do_sample: bool) -> tuple[list[Any], Sampling]:
    """The processors that run as they are, and what the operator does after them. Raises RequestError."""
    for processor in processors:
        name = type(processor).__name__
        if type(processor).__module__ == hf.__name__ and name in _REFUSED:
            raise RequestError(f"{name} is not supported by a deterministic model: {_REFUSED[name]}")
    rest = list(processors)
    if not do_sample:
        return rest, Sampling()
    found: dict[str, Any] = {"temperature": 1.0}
    for warper in reversed(_NATIVE):
        if rest and type(rest[-1]) is warper and _is_plain(rest[-1]):
            found |= _native_settings(rest.pop())
    return rest, Sampling(**found)


def _is_plain(warper: Any) -> bool:
    return getattr(warper, "filter_value", -torch.inf) == -torch.inf and (
        getattr(warper, "min_tokens_to_keep", 1) == 1
    )


def _native_settings(warper: Any) -> dict[str, Any]:
    if isinstance(warper, hf.TemperatureLogitsWarper):
        return {"temperature": float(warper.temperature)}
    if isinstance(warper, hf.TopKLogitsWarper):
        return {"top_k": int(warper.top_k)}
    if isinstance(warper, hf.TopPLogitsWarper):
        return {"top_p": max(float(warper.top_p), torch.finfo(torch.float32).tiny)}
    return {"min_p": float(warper.min_p)}


class RowProcessor:
    """An engine's logits processor that runs Hugging Face's on one row, and keeps its error."""

    def __init__(self, processors: Sequence[Any]) -> None:
        self._processors = [(p, type(p).__module__ == hf.__name__) for p in processors]
        self.error: Exception | None = None

    def __call__(self, tokens: list[int], row: Tensor) -> Tensor:
        """tokens: of the row so far; row: [V] fp32 → [V]."""
        try:
            return self.apply(torch.tensor([tokens]), row.unsqueeze(0))[0]
        except Exception as error:
            self.error = error
            raise

    def apply(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [1, n]; scores: [1, V] → [1, V]."""
        for processor, trusted in self._processors:
            before = None if trusted else scores.clone()
            scores = _checked(processor, processor(input_ids, scores), scores.shape)
            if before is not None:
                again = _checked(processor, processor(input_ids, before), scores.shape)
                if not torch.equal(again.float().view(torch.int32), scores.float().view(torch.int32)):
                    raise RequestError(
                        f"logits processor {_name(processor)} gave two answers to one question: a processor "
                        "must be a pure function of (input_ids, scores)"
                    )
        return scores


def _checked(processor: Any, scores: Any, shape: torch.Size) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != shape or not scores.is_floating_point():
        raise RequestError(
            f"logits processor {_name(processor)} must return float scores {list(shape)} for a row of its own"
        )
    return scores


def _name(processor: Any) -> str:
    return getattr(processor, "__name__", type(processor).__name__)


class Recorder:
    """Keeps the raw logits from which each token of a row was chosen.

    As a logits processor that changes nothing it sees every evaluation, proposals included; the last one of a
    position before its token is committed is the one that counts.
    """

    def __init__(self, prompt_len: int) -> None:
        self._prompt_len = prompt_len
        self._seen: dict[int, tuple[int, Tensor]] = {}

    def __call__(self, tokens: list[int], row: Tensor) -> Tensor:
        self._seen[len(tokens)] = (hash(tuple(tokens)), row.clone())
        return row

    def logits(self, tokens: list[int], index: int) -> Tensor:
        """The raw logits [V] of output `index`; `tokens`: prompt and outputs."""
        length = self._prompt_len + index
        seen, row = self._seen[length]
        if seen != hash(tuple(tokens[:length])):
            raise RuntimeError(f"the logits recorded for output {index} belong to another prefix")
        return row


def committed_scores(processors: Sequence[Any], tokens: list[int], length: int, raw: Tensor) -> Tensor:
    """Hugging Face's processed scores [V] of the token after `tokens[:length]`, warpers included.

    The operator that draws decides the borders of top-p and min-p by its own rounding; the token that it drew
    stays finite.
    """
    ids = torch.tensor([tokens[:length]])
    chosen, scores = tokens[length], raw.unsqueeze(0).clone()
    for processor in processors:
        processed = processor(ids, scores.clone())
        if isinstance(processor, (hf.TopPLogitsWarper, hf.MinPLogitsWarper)):
            processed[0, chosen] = scores[0, chosen]
        scores = processed
    return scores[0]
