"""The engine on the toy model with the real sampling operators."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy import VOCAB, NoisyModel, ToyModel, pure_logits, small_config

from llm42c.runtime.engine import Engine
from llm42c.runtime.sampling import SamplingParams, operator_sampler

PROMPTS = [[(7 * i + 3 * j) % VOCAB for j in range(3 + 4 * i)] for i in range(6)]


def make(fast: ToyModel, **changes: object) -> Engine:
    config = small_config(**changes)
    return Engine(fast, ToyModel(fixed=(12, 4, 12)), config)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=20, temperature=0.9),
        SamplingParams(max_tokens=20, temperature=1.1, top_k=7, top_p=0.8, min_p=0.05, seed=2**63 - 1),
        SamplingParams(max_tokens=20, temperature=0.7, repetition_penalty=1.2, logprobs=3, seed=0),
    ],
)
def test_batched_equals_solo(params: SamplingParams) -> None:
    engine = make(NoisyModel())
    together = engine.generate([*PROMPTS, *PROMPTS[::-1]], params)
    for prompt, output in zip([*PROMPTS, *PROMPTS[::-1]], together, strict=True):
        (alone,) = make(ToyModel(), verify="always").generate([prompt], params)
        assert output.token_ids == alone.token_ids
        assert output.logprobs == alone.logprobs
        assert output.top_logprobs == alone.top_logprobs
    assert engine.stats().rollbacks > 0


def test_log_probs_do_not_depend_on_how_they_were_asked_for() -> None:
    """Top log-probs, or processors that change nothing, leave the bits of the plain request."""
    plain = SamplingParams(max_tokens=16, ignore_eos=True)
    (expected,) = make(ToyModel()).generate([PROMPTS[2]], plain)
    for change in ({"logprobs": 5}, {"logit_bias": {0: 0.0}}, {"logprobs": 2, "min_tokens": 1}):
        (got,) = make(ToyModel()).generate([PROMPTS[2]], dataclasses.replace(plain, **change))
        assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
        for token, logprob, top in zip(got.token_ids, got.logprobs, got.top_logprobs or [], strict=False):
            assert top[0] == (token, logprob)


def test_the_stand_in_of_the_other_tests_agrees_on_greedy_tokens() -> None:
    logits = torch.from_numpy(pure_logits(PROMPTS[3]))[None].repeat(3, 1)
    n = torch.zeros(3)
    token, _ = operator_sampler().sample(logits, n, n.int(), n + 1, n, n.long(), n.long())
    assert token.tolist() == [int(logits[0].argmax())] * 3
