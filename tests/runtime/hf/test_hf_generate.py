"""`generate`: every argument means what it means in Hugging Face, and no row knows of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    EOS,
    PAD,
    VOCAB,
    assert_like_eager,
    assert_rows,
    bits,
    padded,
    plain,
    prompt,
    solo,
    tokenizer,
    wrapped,
)
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

from llm42c.errors import RequestError

PROMPTS = [prompt(9, 1), prompt(3, 2), prompt(14, 3)]
REPEATING = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 9, 9, 9], [11, 12, 13, 14, 11, 12]]


class EvenOnly(LogitsProcessor):
    """Bans odd tokens after an even one."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for i, last in enumerate(input_ids[:, -1].tolist()):
            if last % 2 == 0:
                scores[i, 1::2] = -torch.inf
        return scores


class EndsWith(StoppingCriteria):
    def __init__(self, tokens: set[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([t in self.tokens for t in input_ids[:, -1].tolist()])


# Everything that changes greedy tokens, by the name of what it shows.
GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_length": {"max_length": 30},
    "eos list": {"eos_token_id": list(range(2, 60))},
    "no eos": {"eos_token_id": None},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "repetition_penalty below 1": {"repetition_penalty": 0.6},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {
        "encoder_no_repeat_ngram_size": 1,
        "sequence_bias": {(5,): 9.0, (9,): 9.0, (11,): 9.0},
    },
    "bad_words_ids": {"bad_words_ids": [[5], [7, 8], [100, 101, 102], *([i] for i in range(120, 160))]},
    "sequence_bias": {"sequence_bias": {(5,): 4.0, (6, 7): 9.0}},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(2, 120))},
    "min_length": {"min_length": 18, "eos_token_id": list(range(2, 120))},
    "forced_eos_token_id": {"forced_eos_token_id": EOS},
    "suppress_tokens": {"suppress_tokens": list(range(3, 150))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 150))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.8)},
    "renormalize_logits": {"renormalize_logits": True},
    "remove_invalid_values": {"remove_invalid_values": True},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=3.0, greenlist_ratio=0.5)},
    "prefix_allowed_tokens_fn": {
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(10 + 20 * row + int(ids[-1]) % 7, VOCAB, 3))
    },
    "user processor": {"logits_processor": LogitsProcessorList([EvenOnly()])},
    "user processor of HF": {
        "logits_processor": LogitsProcessorList([processors.NoRepeatNGramLogitsProcessor(1)])
    },
    "warper under greedy": {"top_k": 3, "temperature": 0.3},
    "user criterion": {"stopping_criteria": StoppingCriteriaList([EndsWith(set(range(3, 60)))])},
    "user criterion without eos": {
        "stopping_criteria": StoppingCriteriaList([EndsWith(set(range(3, 40)))]),
        "eos_token_id": None,
    },
    "user MaxLengthCriteria": {"stopping_criteria": StoppingCriteriaList([criteria.MaxLengthCriteria(21)])},
    "user EosTokenCriteria": {
        "stopping_criteria": StoppingCriteriaList([criteria.EosTokenCriteria(list(range(2, 60)))])
    },
    "stop_strings": {"stop_strings": ["a", "b", "c", "d", "e", "1", "z"], "tokenizer": tokenizer()},
    "several": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "bad_words_ids": [[i] for i in range(50)],
        "eos_token_id": list(range(100, 140)),
    },
}


def _length(arguments: dict[str, Any]) -> dict[str, Any]:
    return {} if "max_length" in arguments else {"max_new_tokens": 16}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_are_those_of_eager(name: str) -> None:
    arguments = GREEDY[name] | _length(GREEDY[name])
    for prompts in (PROMPTS, REPEATING, PROMPTS[:1]):
        inputs = padded(prompts)
        ours = wrapped().generate(**inputs, **arguments, do_sample=False)
        assert_like_eager(ours, plain(), inputs, arguments)


def test_forced_bos_token_after_a_prompt_of_one() -> None:
    inputs, arguments = padded([[9]]), {"forced_bos_token_id": 77, "max_new_tokens": 4}
    ours = wrapped().generate(**inputs, **arguments, do_sample=False)
    assert ours[0, 1] == 77
    assert_like_eager(ours, plain(), inputs, arguments)


def test_every_greedy_argument_does_something() -> None:
    """Otherwise the test above shows nothing about it."""
    idle = {"plain", "no eos", "renormalize_logits", "remove_invalid_values", "warper under greedy"}
    default = [r for r, _ in _rows({})]
    same = {name for name, arguments in GREEDY.items() if [r for r, _ in _rows(arguments)] == default}
    assert same == idle


def _rows(arguments: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    return solo(wrapped(), PROMPTS + REPEATING, **arguments, **_length(arguments), do_sample=False)


SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7, "top_k": 0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6, "top_k": 0},
    "min_p": {"min_p": 0.2, "top_k": 0},
    "top_h": {"top_h": 0.4, "top_k": 0},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.01},
    "all": {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
    "with a penalty": {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 1.4},
    "with a processor": {"top_k": 8, "logits_processor": LogitsProcessorList([EvenOnly()])},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_rows_are_their_solo_runs(name: str) -> None:
    arguments = SAMPLED[name] | {"do_sample": True, "max_new_tokens": 12, "seed": 11}
    expected = solo(wrapped(), PROMPTS, **arguments)
    for side in ("left", "right"):
        inputs = padded(PROMPTS, side)
        out = wrapped().generate(**inputs, **arguments, return_dict_in_generate=True)
        assert_rows(out, 14, expected)
    assert expected != solo(wrapped(), PROMPTS, **(arguments | {"seed": 12}))


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_tokens_are_in_the_support_that_hf_gives_them(name: str) -> None:
    """Hugging Face's processors and warpers, on the logits that the token was chosen from."""
    arguments = SAMPLED[name] | {"do_sample": True, "max_new_tokens": 12}
    inputs = padded(PROMPTS)
    out = wrapped().generate(
        **inputs, **arguments, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    kept = []
    for t in range(12):
        for i in range(len(PROMPTS)):
            row = out.sequences[i, 14 : 14 + t + 1].tolist()
            if EOS in row[:-1]:
                continue
            ids = torch.tensor([PROMPTS[i] + row[:-1]])
            scores = _hf_scores(ids, out.logits[t][i : i + 1], arguments, len(PROMPTS[i]))
            assert torch.isfinite(scores[0, row[-1]])
            assert torch.equal(bits(scores[0]), bits(out.scores[t][i]))
            kept.append(int(torch.isfinite(scores).sum()))
    if name not in ("temperature",):
        assert min(kept) < VOCAB


def _hf_scores(
    ids: torch.Tensor, logits: torch.Tensor, arguments: dict[str, Any], start: int
) -> torch.Tensor:
    settings = {k: v for k, v in arguments.items() if k != "logits_processor"}
    config, _ = plain()._prepare_generation_config(None, **settings)
    plain()._prepare_special_tokens(config, True, device=ids.device, batch_size=1)
    user = arguments.get("logits_processor", LogitsProcessorList())
    chain = plain()._get_logits_processor(config, start, ids[:, :start], None, user, "cpu", {})
    return chain(ids, logits.clone())


def test_log_probs_are_those_of_the_logits() -> None:
    inputs = padded(PROMPTS)
    out = wrapped().generate(
        **inputs, max_new_tokens=10, do_sample=True, seed=5, return_dict_in_generate=True, output_logits=True
    )
    eps = torch.finfo(torch.float32).eps
    for t, logits in enumerate(out.logits):
        exact = torch.log_softmax(logits.double(), -1).gather(1, out.sequences[:, 14 + t, None])[:, 0]
        live = out.logprobs[:, t] != 0
        assert live.any()
        bound = VOCAB * eps + 4 * eps * (logits.abs().amax(-1) + exact.abs())
        assert ((out.logprobs[:, t] - exact).abs() <= bound)[live].all()
    assert set(out.keys()) == {"sequences", "logits", "logprobs", "lengths"}


def test_outputs_change_neither_tokens_nor_log_probs() -> None:
    inputs = padded(PROMPTS)
    arguments = {
        "max_new_tokens": 10,
        "do_sample": True,
        "seed": 5,
        "top_p": 0.7,
        "return_dict_in_generate": True,
    }
    bare = wrapped().generate(**inputs, **arguments)
    full = wrapped().generate(**inputs, **arguments, output_logits=True, output_scores=True)
    assert torch.equal(bare.sequences, full.sequences)
    assert torch.equal(bits(bare.logprobs), bits(full.logprobs))
    assert bare.scores is None
    assert bare.logits is None


def test_logits_are_close_to_eager() -> None:
    inputs = padded(PROMPTS)
    arguments = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    ours, theirs = (m.generate(**inputs, **arguments, eos_token_id=None) for m in (wrapped(), plain()))
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert (a - b).abs().max() < 2 * 7 * 96 * torch.finfo(torch.float32).eps * b.abs().max()


def test_transition_scores_work() -> None:
    out = wrapped().generate(
        **padded(PROMPTS[:1]),
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=None,
    )
    scores = wrapped().compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert torch.allclose(scores, out.logprobs, atol=1e-5)


# -- rows and padding ----------------------------------------------------------------------------------


def test_padding_on_either_side_and_inside() -> None:
    expected = solo(wrapped(), PROMPTS, max_new_tokens=8, do_sample=False)
    for side in ("left", "right"):
        inputs = padded(PROMPTS, side)
        out = wrapped().generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        assert_rows(out, 14, expected)
        assert torch.equal(out.sequences[:, :14], inputs["input_ids"])
    holes = torch.tensor([[PAD, *PROMPTS[0][:4], 77, 78, *PROMPTS[0][4:], PAD]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0]])
    out = wrapped().generate(
        holes, attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    assert_rows(out, 13, expected[:1])


def test_without_a_mask_padding_is_recognised() -> None:
    inputs = padded(PROMPTS)
    with_mask = wrapped().generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(wrapped().generate(inputs["input_ids"], max_new_tokens=6, do_sample=False), with_mask)


def test_num_return_sequences() -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "seed": 3, "num_return_sequences": 3}
    out = wrapped().generate(**padded(PROMPTS), **arguments, return_dict_in_generate=True)
    assert_rows(out, 14, solo(wrapped(), PROMPTS, **arguments))
    first = solo(wrapped(), PROMPTS, max_new_tokens=8, do_sample=True, seed=3)
    assert out.sequences[::3, 14:].tolist() == [
        r + [PAD] * (out.sequences.shape[1] - 14 - len(r)) for r, _ in first
    ]
    assert len({tuple(r.tolist()) for r in out.sequences}) == 9


def test_seeds_of_prompts_and_the_global_generator() -> None:
    arguments = {"max_new_tokens": 8, "do_sample": True, "return_dict_in_generate": True}
    torch.manual_seed(1)
    one = wrapped().generate(**padded(PROMPTS), **arguments, seed=[7, 8, 9])
    torch.manual_seed(2)
    two = wrapped().generate(**padded(PROMPTS), **arguments, seed=torch.tensor([7, 8, 9]))
    before = torch.random.get_rng_state()
    assert torch.equal(one.sequences, two.sequences)
    again = wrapped().generate(**padded(PROMPTS), **arguments, seed=np.array([7, 8, 9]))
    assert torch.equal(one.sequences, again.sequences)
    for i, seed in enumerate((7, 8, 9)):
        assert_rows_equal(
            one, i, solo(wrapped(), [PROMPTS[i]], max_new_tokens=8, do_sample=True, seed=seed)[0]
        )
    assert torch.equal(before, torch.random.get_rng_state())
    for bad in (-1, 2**63, 1.5, True, "x", [1, 2]):
        with pytest.raises(RequestError, match="seed"):
            wrapped().generate(**padded(PROMPTS), **arguments, seed=bad)


def assert_rows_equal(out: Any, row: int, expected: tuple[list[int], list[int]]) -> None:
    tokens, values = expected
    assert out.sequences[row, 14 : 14 + len(tokens)].tolist() == tokens
    assert bits(out.logprobs)[row, : len(tokens)].tolist() == values


def test_a_greedy_row_beside_sampled_ones() -> None:
    """Greedy and sampled requests of two threads' calls share batches."""
    import threading

    expected_greedy = solo(wrapped(), PROMPTS, max_new_tokens=20, do_sample=False)
    expected_sampled = solo(wrapped(), PROMPTS, max_new_tokens=20, do_sample=True, seed=4)
    results: dict[str, Any] = {}

    def call(name: str, **arguments: Any) -> None:
        results[name] = wrapped().generate(
            **padded(PROMPTS), **arguments, max_new_tokens=20, return_dict_in_generate=True
        )

    threads = [
        threading.Thread(target=call, args=("greedy",), kwargs={"do_sample": False}),
        threading.Thread(target=call, args=("sampled",), kwargs={"do_sample": True, "seed": 4}),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_rows(results["greedy"], 14, expected_greedy)
    assert_rows(results["sampled"], 14, expected_sampled)


def test_generation_config_object_and_model_default() -> None:
    config = GenerationConfig(
        max_new_tokens=7, do_sample=True, top_p=0.8, eos_token_id=EOS, pad_token_id=PAD, stop_strings=["a"]
    )
    ours = wrapped().generate(**padded(PROMPTS), generation_config=config, tokenizer=tokenizer(), seed=2)
    again = wrapped().generate(
        **padded(PROMPTS),
        max_new_tokens=7,
        do_sample=True,
        top_p=0.8,
        stop_strings=["a"],
        tokenizer=tokenizer(),
        seed=2,
    )
    assert torch.equal(ours, again)
    assert config.stop_strings == ["a"]


def test_seed_of_a_generation_config() -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 7, "do_sample": True}
    config = GenerationConfig(**arguments, eos_token_id=EOS, pad_token_id=PAD, seed=9)
    ours = wrapped().generate(**padded(PROMPTS), generation_config=config)
    assert torch.equal(ours, wrapped().generate(**padded(PROMPTS), **arguments, seed=9))
    assert not torch.equal(ours, wrapped().generate(**padded(PROMPTS), **arguments))


def test_pipeline() -> None:
    """Texts of several lengths in one batch, and arguments that a pipeline passes on."""
    pipe = pipeline("text-generation", model=wrapped(), tokenizer=tokenizer())
    texts = ["ab cd", "the quick brown fox", "z"]
    way: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "seed": 4, "num_return_sequences": 2}
    way |= {"temperature": 0.9}  # a pipeline has a default of its own
    together = pipe(texts, **way, batch_size=3)
    assert together == [pipe(text, **way) for text in texts]
    ids = tokenizer()(texts[0], return_tensors="pt")
    rows = wrapped().generate(input_ids=ids["input_ids"], **way)
    assert [r["generated_text"] for r in together[0]] == tokenizer().batch_decode(
        rows, skip_special_tokens=True
    )


def test_no_arguments_at_all_starts_from_bos() -> None:
    assert torch.equal(wrapped().generate(do_sample=False), plain().generate(do_sample=False))
