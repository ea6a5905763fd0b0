"""What `generate` returns with `return_dict_in_generate=True`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class DeterministicOutput(GenerateDecoderOnlyOutput):
    """Hugging Face's output of a decoder, with the exact log-probability of every generated token.

    `logprobs` [B, N] float32: `log_softmax` of the raw logits at the chosen token, 0 where a row has ended,
    so that the sum over a row is the log-probability of its sequence. `lengths` [B] int64: how many tokens a
    row generated before its padding. `scores` and `logits` hold zeros where a row has ended.
    The cache, `attentions` and `hidden_states` are None.
    """

    logprobs: Tensor | None = None
    lengths: Tensor | None = None
