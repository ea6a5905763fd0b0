"""Stop rules, streamers, code of the caller that fails, and what is refused."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, padded, plain, prompt, tokenizer, wrapped
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicCache
from transformers.generation import logits_process as processors

from llm42c.errors import RequestError
from llm42c.runtime.hf import arguments as args
from llm42c.runtime.step_times import Ledger, StepTimes

PROMPTS = [prompt(9, 1), prompt(3, 2), prompt(14, 3)]


class Collector:
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("rows", [1, 3])
def test_streamer_gets_what_is_returned(rows: int) -> None:
    collector, inputs = Collector(), padded(PROMPTS[:rows])
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": list(range(2, 40))}
    out = wrapped().generate(**inputs, **arguments, streamer=collector)
    width = inputs["input_ids"].shape[1]
    assert collector.ended
    assert collector.puts[0] == inputs["input_ids"].reshape(-1).tolist()
    assert collector.puts[1:] == out[:, width:].T.tolist()
    theirs = Collector()
    plain().generate(**inputs, **arguments, streamer=theirs)
    assert collector.puts == theirs.puts


def test_text_streamer() -> None:
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True)
    out = wrapped().generate(**padded(PROMPTS[:1]), max_new_tokens=8, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer().decode(out[0, 9:])


def test_max_time() -> None:
    inputs = padded(PROMPTS[:2])
    everything = wrapped().generate(**inputs, max_new_tokens=60, do_sample=False, eos_token_id=None)
    start = time.perf_counter()
    out = wrapped().generate(**inputs, max_new_tokens=60, do_sample=False, eos_token_id=None, max_time=1e-3)
    assert time.perf_counter() - start < 5
    assert 10 <= out.shape[1] < everything.shape[1]
    assert torch.equal(out, everything[:, : out.shape[1]])


class Hidden(LogitsProcessor):
    """Bans another token each time it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, self.calls] = -torch.inf
        return scores


class Broken(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")


class WrongShape(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores[:, :-1]


def _with(processor: Any) -> Any:
    return wrapped().generate(
        **padded(PROMPTS),
        max_new_tokens=5,
        do_sample=False,
        logits_processor=LogitsProcessorList([processor]),
    )


def test_processors_that_cannot_be_kept() -> None:
    with pytest.raises(RequestError, match="Hidden gave two answers"):
        _with(Hidden())
    with pytest.raises(KeyError, match="mine"):
        _with(Broken())
    with pytest.raises(RequestError, match="WrongShape must return"):
        _with(WrongShape())
    with pytest.raises(RequestError, match="cannot call the model that it belongs to"):
        _with(lambda ids, scores: wrapped().generate(ids, max_new_tokens=1))
    with pytest.raises(RequestError, match="SynthID"):
        _with(processors.SynthIDTextWatermarkLogitsProcessor(5, [1, 2, 3, 4], 16, 16, 16, "cpu"))
    assert not wrapped().llm42._pump.engine.has_unfinished()


def test_a_broken_criterion_raises_and_leaves_nothing_behind() -> None:
    class Bad(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        wrapped().generate(
            **padded(PROMPTS), max_new_tokens=5, stopping_criteria=StoppingCriteriaList([Bad()])
        )
    assert not wrapped().llm42._pump.engine.has_unfinished()


def test_criteria_get_scores_when_they_are_returned() -> None:
    seen = []

    class Looks(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(None if scores is None else (len(scores), scores[-1].shape))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    rules = StoppingCriteriaList([Looks()])
    arguments = {"max_new_tokens": 3, "do_sample": False, "stopping_criteria": rules, "eos_token_id": None}
    wrapped().generate(**padded(PROMPTS[:1]), **arguments)
    assert seen == [None] * 3
    seen.clear()
    wrapped().generate(**padded(PROMPTS[:1]), **arguments, output_scores=True, return_dict_in_generate=True)
    assert seen == [(n, (1, VOCAB)) for n in (1, 2, 3)]


REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 2},
    "penalty_alpha": {"penalty_alpha": 0.5, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "guidance_scale": {"guidance_scale": 2.0},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 0},
    "assistant_model": {"assistant_model": object()},
    "assistant_tokenizer": {"assistant_tokenizer": object()},
    "constraints": {"constraints": [object()]},
    "force_words_ids": {"force_words_ids": [[5]]},
    "negative_prompt_ids": {"negative_prompt_ids": torch.tensor([[3]])},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 3, 64)},
    "past_key_values": {"past_key_values": object()},
    "cache": {"cache": object()},
    "token_healing": {"token_healing": True},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "custom_generate": {"custom_generate": lambda *a, **k: None},
    "cache_implementation": {"cache_implementation": "quantized"},
    "position_ids": {"position_ids": torch.tensor([[3, 4, 5]])},
    "stop_strings": {"stop_strings": ["a"]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        wrapped().generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, **REFUSED[name])
    assert "\n" not in str(caught.value)


def drafts_always_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimes, "of", lambda self, num_tokens: 1.0)
    monkeypatch.setattr(Ledger, "rests", lambda self, requests: False)


@pytest.mark.parametrize("in_config", [False, True])
def test_prompt_lookup_changes_no_bit(in_config: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[3, 4, 5, 6] * 4, [7, 8] * 5]
    rules: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    plain = wrapped().generate(**padded(prompts), **rules)
    stats = wrapped().llm42._pump.engine.stats()
    before = stats.drafted_tokens
    drafts_always_pay(monkeypatch)
    lookup = {"prompt_lookup_num_tokens": 3}
    if in_config:
        config = GenerationConfig(**rules, **lookup)
        drafted = wrapped().generate(**padded(prompts), generation_config=config)
        assert config.prompt_lookup_num_tokens == 3
    else:
        drafted = wrapped().generate(**padded(prompts), **rules, **lookup)
    assert torch.equal(drafted, plain)
    assert stats.drafted_tokens > before


def test_an_assistant_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is right is believed; it keeps its own weights, and Hugging Face's signature its meaning."""
    prompts = [[3, 4, 5, 6] * 4, [7, 8, 9]]
    rules: dict[str, Any] = {"max_new_tokens": 16, "do_sample": True, "seed": 3, "eos_token_id": None}
    expected = wrapped().generate(**padded(prompts), **rules)
    stats = wrapped().llm42._pump.engine.stats()
    before = stats.accepted_drafts
    drafts_always_pay(monkeypatch)
    assistant = plain()
    weights = {name: value.clone() for name, value in assistant.state_dict().items()}
    assert torch.equal(wrapped().generate(**padded(prompts), **rules, assistant_model=assistant), expected)
    assert stats.accepted_drafts > before
    assert stats.draft_weight_bytes > 0
    assert all(torch.equal(value, weights[name]) for name, value in assistant.state_dict().items())


def test_an_assistant_of_another_vocabulary_is_refused() -> None:
    config = copy.deepcopy(plain().config)
    config.vocab_size += 8
    other = type(plain())(config)
    ids = torch.tensor([[3, 4, 5]])
    for assistant, why in ((other, "vocabulary"), (wrapped(), "itself"), (object(), "Hugging Face model")):
        with pytest.raises(RequestError, match=f"assistant_model.*{why}") as refused:
            wrapped().generate(ids, max_new_tokens=4, assistant_model=assistant)
        assert "\n" not in str(refused.value)
    with pytest.raises(RequestError, match="only one of them"):
        wrapped().generate(ids, assistant_model=plain(), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "memory"])
def test_a_cache_is_known_by_its_type(name: str) -> None:
    """Whatever a release calls it: refused from a caller, left aside where `generate` prepared it."""
    with pytest.raises(RequestError, match=f"{name}: a cache of the caller"):
        args.require_supported({name: DynamicCache()})
    args.require_known({name: DynamicCache()})
    with pytest.raises(RequestError, match="token_type_ids"):
        args.require_known({name: DynamicCache(), "token_type_ids": torch.zeros(1, 3)})


def test_bad_inputs() -> None:
    with pytest.raises(RequestError, match="row 1 of the batch holds no token"):
        wrapped().generate(
            torch.tensor([[3, 4], [0, 0]]), attention_mask=torch.tensor([[1, 1], [0, 0]]), max_new_tokens=4
        )
    with pytest.raises(RequestError, match="outside the vocabulary"):
        wrapped().generate(torch.tensor([[3, 400]]), max_new_tokens=4)
    with pytest.raises(RequestError, match="exceed the context"):
        wrapped().generate(torch.tensor([[3, 4]]), max_new_tokens=400)
    with pytest.raises(ValueError, match="not used by the model"):
        wrapped().generate(torch.tensor([[3, 4]]), max_new_tokens=4, tempperature=1.0)
    assert not wrapped().llm42._pump.engine.has_unfinished()
