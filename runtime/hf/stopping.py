"""When a row ends: Hugging Face's stopping criteria, evaluated on committed tokens, one row at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import stopping_criteria as hf

from llm42c.errors import RequestError


@dataclass
class Stopping:
    """The stop rules of one call.

    `max_new_tokens` and `eos_ids` are the engine's own; `criteria` are called after every committed token
    with the row's tokens [1, n], without padding, and the row's scores if they are returned.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    criteria: list[Any] = field(default_factory=list)
    deadline: float | None = None  # of time.time()

    def met(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None) -> bool:
        """Whether a criterion ends the row. input_ids: [1, n]."""
        return any(_says_stop(c, c(input_ids, scores)) for c in self.criteria)

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.time() > self.deadline


def prepare(config: Any, width: int, criteria: Sequence[Any], tokenizer: Any, stop_strings: Any) -> Stopping:
    """The rules of a prepared generation config, of the caller's criteria and of stop strings.

    `width` is the padded length of the prompts, which `max_length` counts. A criterion of the caller replaces
    the config's rule of the same type, as it does in Hugging Face. Raises RequestError.
    """
    eos = config._eos_token_tensor
    stopping = Stopping(config.max_length - width, () if eos is None else tuple(eos.reshape(-1).tolist()))
    if stop_strings is not None and not any(isinstance(c, hf.StopStringCriteria) for c in criteria):
        if tokenizer is None:
            raise RequestError("stop_strings need the model's tokenizer: pass tokenizer= to generate")
        stopping.criteria.append(hf.StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer))
    if config.max_time is not None:
        stopping.deadline = time.time() + config.max_time
    for criterion in criteria:
        if type(criterion) is hf.MaxLengthCriteria:
            stopping.max_new_tokens = criterion.max_length - width
        elif type(criterion) is hf.EosTokenCriteria:
            stopping.eos_ids = tuple(criterion.eos_token_id.reshape(-1).tolist())
        elif type(criterion) is hf.MaxTimeCriteria:
            stopping.deadline = criterion.initial_timestamp + criterion.max_time
        else:
            stopping.criteria.append(criterion)
    if stopping.max_new_tokens < 1:
        raise RequestError(f"the prompts are {width} tokens long, which leaves nothing to generate")
    return stopping


def _says_stop(criterion: Any, answer: Any) -> bool:
    """A criterion answers with a bool, or with a bool tensor of one entry."""
    if isinstance(answer, Tensor):
        if answer.numel() != 1:
            raise RequestError(
                f"stopping criterion {type(criterion).__name__} answered for {answer.numel()} rows of 1"
            )
        return bool(answer.to(torch.bool).reshape(()).item())
    return bool(answer)
