"""Random valid calls: every row is its solo run bit for bit, and greedy tokens are those of eager."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, assert_like_eager, assert_rows, bits, padded, plain, solo, tokenizer, wrapped
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)


class Residue(LogitsProcessor):
    """A user's processor: bans tokens by what came before."""

    def __init__(self, modulus: int) -> None:
        self.modulus = modulus

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for i, last in enumerate(input_ids[:, -1].tolist()):
            scores[i, last % self.modulus :: self.modulus] -= 2.0
        return scores


class StopsAt(StoppingCriteria):
    def __init__(self, modulus: int) -> None:
        self.modulus = modulus

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % self.modulus == 0


TOKEN = st.one_of(st.integers(3, 12), st.integers(3, VOCAB - 1))  # short alphabets repeat n-grams
PROMPTS = st.lists(st.lists(TOKEN, min_size=1, max_size=24), min_size=1, max_size=4)
# Hugging Face's processors see padding as tokens that were said, so eager gets prompts of one length.
EVEN_PROMPTS = st.tuples(st.integers(1, 4), st.integers(1, 24)).flatmap(
    lambda shape: st.lists(
        st.lists(TOKEN, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)
EOS_IDS = st.one_of(st.none(), st.just(2), st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=40))
BAD_WORDS = st.lists(st.lists(TOKEN, min_size=1, max_size=3), min_size=1, max_size=5)
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([0.7, 1.2, 2.0]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": BAD_WORDS,
    "min_new_tokens": st.integers(1, 6),
    "encoder_repetition_penalty": st.sampled_from([0.8, 1.5]),
    "sequence_bias": st.dictionaries(st.tuples(TOKEN), st.sampled_from([-5.0, 3.0]), min_size=1, max_size=4),
    "suppress_tokens": st.lists(TOKEN, min_size=1, max_size=30),
    "begin_suppress_tokens": st.lists(TOKEN, min_size=1, max_size=30),
    "forced_eos_token_id": st.just(7),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "watermarking_config": st.sampled_from([1, 2]).map(
        lambda n: WatermarkingConfig(bias=2.0, context_width=n)
    ),
    "prefix_allowed_tokens_fn": st.integers(2, 5).map(
        lambda n: lambda _, ids: range(3 + int(ids[-1]) % n, VOCAB, n)
    ),
    "remove_invalid_values": st.just(True),
    "exponential_decay_length_penalty": st.just((2, 1.5)),
    "renormalize_logits": st.just(True),
    "logits_processor": st.integers(2, 9).map(lambda n: LogitsProcessorList([Residue(n)])),
    "stopping_criteria": st.integers(3, 30).map(lambda n: StoppingCriteriaList([StopsAt(n)])),
    "stop_strings": st.lists(st.sampled_from(["a", "b", "ab", "Q", "9", "c."]), min_size=1, max_size=3),
}
WARPERS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.5, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 1, 5, 50]),
    "top_p": st.sampled_from([0.3, 0.9, 1.0]),
    "min_p": st.sampled_from([0.05, 0.3]),
    "typical_p": st.sampled_from([0.5, 0.95]),
    "epsilon_cutoff": st.just(0.01),
    "top_h": st.just(0.4),
    "eta_cutoff": st.just(0.02),
}


@st.composite
def calls(draw: st.DrawFn, *, sampled: bool) -> dict[str, Any]:
    chosen = draw(st.sets(st.sampled_from(sorted(SETTINGS)), max_size=4))
    if sampled:
        chosen |= draw(st.sets(st.sampled_from(sorted(WARPERS)), max_size=3))
    arguments = {name: draw((SETTINGS | WARPERS)[name]) for name in sorted(chosen)}
    arguments |= {
        "eos_token_id": draw(EOS_IDS),
        "max_new_tokens": draw(st.integers(1, 12)),
        "pad_token_id": 0,
    }
    if arguments["eos_token_id"] is None:
        arguments.pop("exponential_decay_length_penalty", None)
        if "stopping_criteria" in arguments or "stop_strings" in arguments:
            arguments["eos_token_id"] = 2  # else rows go on until the last one stops: see test_hf_generate
    if forced := arguments.get("forced_eos_token_id"):  # forced and suppressed would leave nothing to choose
        for name in {"suppress_tokens", "begin_suppress_tokens"} & arguments.keys():
            arguments[name] = [token for token in arguments[name] if token != forced] or [forced + 1]
    if "min_new_tokens" in arguments:
        arguments["min_new_tokens"] = min(arguments["min_new_tokens"], arguments["max_new_tokens"])
    if "stop_strings" in arguments:
        arguments["tokenizer"] = tokenizer()
    return arguments


@settings(max_examples=40, deadline=None)
@given(
    prompts=PROMPTS,
    arguments=st.one_of(calls(sampled=False), calls(sampled=True).map(lambda c: c | {"do_sample": True})),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 2**63 - 1),
    copies=st.integers(1, 2),
)
def test_rows_are_their_solo_runs(
    prompts: list[list[int]], arguments: dict[str, Any], side: str, seed: int, copies: int
) -> None:
    sampled = arguments.get("do_sample", False)
    arguments = {"do_sample": False, "seed": seed} | arguments
    if sampled:
        arguments["num_return_sequences"] = copies
    expected = solo(wrapped(), prompts, **arguments)
    inputs = padded(prompts, side)
    out = wrapped().generate(**inputs, **arguments, return_dict_in_generate=True)
    assert_rows(out, inputs["input_ids"].shape[1], expected)
    outputs = wrapped().generate_batch(prompts, **arguments)
    found = [(o.generated_tokens, bits(torch.tensor(o.logprobs)).tolist()) for o in outputs.values()]
    assert found == expected


@settings(max_examples=40, deadline=None)
@given(prompts=EVEN_PROMPTS, arguments=calls(sampled=False))
def test_greedy_tokens_are_those_of_eager(prompts: list[list[int]], arguments: dict[str, Any]) -> None:
    inputs = padded(prompts)
    ours = wrapped().generate(**inputs, **arguments, do_sample=False)
    assert_like_eager(ours, plain(), inputs, arguments)
