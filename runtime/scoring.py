"""Log-probs of given tokens, with the bits that generating them would have given: a completion as a draft
that is taken instead of compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm42c.errors import RequestError
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class Scored:
    """One entry a token of the completion. Log-probs are exact float32 values."""

    logprobs: list[float]
    greedy: list[bool]  # whether the token is the likeliest one, ties by token id

    @property
    def total(self) -> float:
        """Sum of the log-probs in double precision, first to last."""
        return sum(self.logprobs)


def scoring_params(completion: Sequence[int]) -> SamplingParams:
    """Raises RequestError for an empty completion."""
    if not len(completion):
        raise RequestError("the completion is empty: there is nothing to score")
    return SamplingParams(max_tokens=len(completion), ignore_eos=True, detokenize=False, logprobs=1)


def scored(output: RequestOutput) -> Scored:
    """Raises RequestError if the request failed."""
    if output.error is not None:
        raise RequestError(f"the completion cannot be scored: {output.error}")
    tops = output.top_logprobs or []
    return Scored(output.logprobs, [t == top[0][0] for t, top in zip(output.token_ids, tops, strict=True)])
