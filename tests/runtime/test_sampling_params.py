from __future__ import annotations

import math

import pytest

from llm42c.errors import RequestError
from llm42c.runtime.sampling import MAX_SEED, SamplingParams


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.0},
        {"max_tokens": True},
        {"min_tokens": -1},
        {"min_tokens": 5, "max_tokens": 4},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": None},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "min_p": -0.1},
        {"temperature": 1.0, "min_p": 1.1},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"frequency_penalty": 2.5},
        {"presence_penalty": -2.5},
        {"seed": -1},
        {"seed": MAX_SEED + 1},
        {"seed": 1.5},
        {"logprobs": -1},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {"1": 1.0}},
        {"logit_bias": [1]},
        {"stop_token_ids": (-1,)},
        {"stop_token_ids": 5},
        {"stop": ("",)},
        {"stop": (3,)},
        {"stop": ("a",), "detokenize": False},
        {"logits_processors": (3,)},
    ],
)
def test_mistakes_have_an_error_of_one_line(bad: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**bad)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert any(name in str(caught.value) for name in bad)


def test_boundaries_are_allowed() -> None:
    SamplingParams(seed=0)
    SamplingParams(seed=MAX_SEED)
    SamplingParams(temperature=1.0, top_p=1e-6, min_p=1.0, top_k=1)
    SamplingParams(min_tokens=4, max_tokens=4)
    SamplingParams(logprobs=0)


def test_one_stop_string_may_be_given_plainly() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_derived_seeds() -> None:
    base = SamplingParams(temperature=1.0, logit_bias={1: 1.0, 2: 2.0})
    same = SamplingParams(temperature=1.0, logit_bias={2: 2.0, 1: 1.0})
    assert base.derived_seed([1, 2]) == same.derived_seed([1, 2])
    assert 0 <= base.derived_seed([1, 2]) <= MAX_SEED
    assert len({base.derived_seed([1, 2]), base.derived_seed([2, 1]), base.derived_seed([1])}) == 3
    assert SamplingParams(temperature=0.9).derived_seed([1]) != SamplingParams(temperature=1.0).derived_seed(
        [1]
    )
    # A known value: seeds must not change with the Python process or version.
    assert SamplingParams(temperature=1.0).derived_seed([1, 2, 3]) == 2066821965301511109
