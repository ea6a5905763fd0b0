from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    # A known value: seeds must not change with the Python process or version.
    assert SamplingParams(temperature=1.0).derived_seed([1, 2, 3]) == 6166930868629651570


DISTRIBUTION: dict[str, Any] = {
    "temperature": st.sampled_from((0.5, 1, 2)),
    "top_k": st.integers(0, 3),
    "top_p": st.sampled_from((0.25, 0.5, 1)),
    "min_p": st.sampled_from((0, 0.25, 1)),
    "repetition_penalty": st.sampled_from((0.5, 1, 2)),
    "frequency_penalty": st.sampled_from((-1, 0, 0.5)),
    "presence_penalty": st.sampled_from((-1, 0, 0.5)),
    "logit_bias": st.none() | st.dictionaries(st.integers(0, 3), st.sampled_from((-1, 0, 2)), max_size=3),
}
OTHER: dict[str, Any] = {
    "max_tokens": st.none() | st.integers(8, 99),
    "min_tokens": st.integers(0, 8),
    "stop_token_ids": st.sampled_from(((), (1,))),
    "stop": st.sampled_from(((), ("end",))),
    "include_stop": st.booleans(),
    "ignore_eos": st.booleans(),
    "logprobs": st.none() | st.integers(0, 5),
}
distributions, others = st.fixed_dictionaries(DISTRIBUTION), st.fixed_dictionaries(OTHER)


def _canonical(values: dict[str, Any]) -> dict[str, Any]:
    """The distribution by hand: floats, and a bias without zeros."""
    bias = {token: float(b) for token, b in (values["logit_bias"] or {}).items() if b}
    return {name: float(v) for name, v in values.items() if name != "logit_bias"} | {"logit_bias": bias}


@given(distributions, distributions, others, others, st.booleans())
def test_equal_distributions_and_only_they_have_equal_seeds(
    one: dict[str, Any], two: dict[str, Any], this: dict[str, Any], that: dict[str, Any], same: bool
) -> None:
    if same:  # spelled in another way
        two = _canonical(one) | {"top_k": one["top_k"]}
    mine = SamplingParams(**one, **this).derived_seed([4, 5])
    equal = mine == SamplingParams(**two, **that).derived_seed([4, 5])
    assert equal == (_canonical(one) == _canonical(two))
    assert mine != SamplingParams(**one, **this).derived_seed([5, 4])


def test_numbers_that_the_sampler_reads_alike_are_alike() -> None:
    def seed(**params: Any) -> int:
        return SamplingParams(**{"temperature": 1, **params}).derived_seed([1])

    assert seed(presence_penalty=0.0) == seed(presence_penalty=-0.0)
    assert seed(temperature=0.1) == seed(temperature=float(np.float32(0.1)))
    assert seed(temperature=0.1) != seed(temperature=float(np.nextafter(np.float32(0.1), np.float32(1))))
    assert seed(top_k=2**40) != seed(top_k=0)
