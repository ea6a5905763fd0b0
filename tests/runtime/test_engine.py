"""The engine on the toy model: what comes out, what is refused, what fails alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from toy import (
    EOS,
    VOCAB,
    NoisyModel,
    ToyModel,
    ToySampler,
    make_engine,
    pure_logits,
    reference,
    small_config,
    solo,
    toy_decode,
)

from llm42c.errors import ConfigError, ContractMismatchError, RequestError
from llm42c.runtime.block_pool import BlockPool
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.request import State
from llm42c.runtime.sampling import SamplingParams

PROMPTS = [[(7 * i + 3 * j) % VOCAB for j in range(2 + 3 * i)] for i in range(8)]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("verify", ["auto", "always"])
def test_greedy_equals_decoding_without_engine(verify: str, deterministic: bool) -> None:
    engine = make_engine(config=small_config(verify=verify))
    outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=12), deterministic=deterministic)
    assert [o.token_ids for o in outputs] == [reference(p, 12) for p in PROMPTS]


def test_logprobs_are_of_the_raw_logits() -> None:
    params = SamplingParams(max_tokens=4, repetition_penalty=1.5, temperature=0.7, seed=3, logprobs=3)
    (output,) = make_engine().generate([PROMPTS[3]], params)
    tokens = list(PROMPTS[3])
    assert output.top_logprobs is not None
    for token, logprob, top in zip(output.token_ids, output.logprobs, output.top_logprobs, strict=True):
        raw = torch.from_numpy(pure_logits(tokens)).double().log_softmax(0)
        # fp32 log-softmax of values below 16: a few roundings of numbers below 32.
        assert abs(logprob - raw[token].item()) < 8 * 32 * 2**-24
        order = torch.sort(raw, descending=True, stable=True).indices[:3].tolist()
        assert [t for t, _ in top] == order
        assert dict(top).get(token, logprob) == logprob, "one token, two log-probs"
        tokens.append(token)


def test_certified_buckets_commit_without_replay_and_speculative_ones_do_not() -> None:
    exact = make_engine(config=small_config(certify="startup"))
    exact.generate(PROMPTS, SamplingParams(max_tokens=12))
    assert exact.stats().verified_tokens == 0
    assert exact.stats().certified_share == 1.0
    noisy = make_engine(NoisyModel(), small_config(certify="startup"))
    noisy.generate(PROMPTS, SamplingParams(max_tokens=12))
    assert noisy.stats().certified_tokens == 0
    assert noisy.stats().rollbacks > 0


def test_lazy_certification_reaches_the_certified_path() -> None:
    engine = make_engine()
    engine.generate(PROMPTS, SamplingParams(max_tokens=40, ignore_eos=True))
    stats = engine.stats()
    assert stats.probes > 0
    assert stats.verified_tokens > 0, "unprobed buckets count as speculative"
    assert stats.certified_tokens > 0


def test_a_certified_bucket_is_preferred_to_a_smaller_speculative_one() -> None:
    engine = make_engine(NoisyModel(noisy=lambda tokens, call: tokens == 1), small_config(certify="startup"))
    assert engine.certificates.status[1, 1] == "speculative"
    engine.generate([PROMPTS[2]], SamplingParams(max_tokens=10, ignore_eos=True))
    assert engine.stats().verified_tokens == 0


@pytest.mark.parametrize("fast", [ToyModel, NoisyModel])
def test_streaming_equals_non_streaming(fast: type[ToyModel]) -> None:
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=1, stop=("ab", "Q"), logprobs=2)
    whole = make_engine(fast()).generate(PROMPTS, params)
    engine = make_engine(fast())
    ids = [engine.submit(p, params) for p in PROMPTS]
    parts: dict[str, list[RequestOutput]] = {i: [] for i in ids}
    while engine.has_unfinished():
        for output in engine.step():
            parts[output.request_id].append(output)
    for request_id, output in zip(ids, whole, strict=True):
        news = parts[request_id]
        assert [t for o in news for t in o.new_token_ids] == news[-1].token_ids == output.token_ids
        assert [x for o in news for x in o.new_logprobs] == news[-1].logprobs == output.logprobs
        assert [x for o in news for x in o.new_top_logprobs or []] == output.top_logprobs
        assert "".join(o.new_text for o in news) == news[-1].text == output.text
        assert news[-1].finish_reason == output.finish_reason
        assert not any(o.finished for o in news[:-1])


@pytest.mark.parametrize("max_tokens", [1, 4, 5, 6])  # window 5
@pytest.mark.parametrize("fast", [ToyModel, NoisyModel])
def test_max_tokens_around_the_window(fast: type[ToyModel], max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    (output,) = make_engine(fast(), small_config(verify="always")).generate([PROMPTS[4]], params)
    assert output.token_ids == reference(PROMPTS[4], max_tokens, frozenset())
    assert output.finish_reason == "length"


def test_stop_reasons() -> None:
    full = reference(PROMPTS[5], 30, frozenset())
    first = {t: full.index(t) for t in full}
    token = max((t for t in first if t != EOS), key=lambda t: first[t])
    params = SamplingParams(max_tokens=30, stop_token_ids=(token,), ignore_eos=True)
    (output,) = make_engine().generate([PROMPTS[5]], params)
    assert output.token_ids == full[: first[token] + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", token)
    assert output.text == toy_decode(full[: first[token]]), "a stop token is not part of the text"

    (later,) = make_engine().generate(
        [PROMPTS[5]],
        SamplingParams(max_tokens=30, min_tokens=20, ignore_eos=True, stop=(toy_decode(full)[3],)),
    )
    assert len(later.token_ids) > 20, "stop strings are ignored until min_tokens came out"


def test_min_tokens_masks_the_end_of_sequence() -> None:
    bias = {EOS: 20.0}
    (short,) = make_engine().generate([PROMPTS[1]], SamplingParams(max_tokens=12, logit_bias=bias))
    assert short.token_ids == [EOS]
    (longer,) = make_engine().generate(
        [PROMPTS[1]], SamplingParams(max_tokens=12, min_tokens=7, logit_bias=bias)
    )
    assert len(longer.token_ids) == 8
    assert longer.token_ids.index(EOS) == 7


def test_a_derived_seed_is_a_function_of_the_request() -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True)
    alone = solo(PROMPTS[3], params)
    engine = make_engine(NoisyModel())
    outputs = engine.generate([*PROMPTS[:3], PROMPTS[3], PROMPTS[3]], params)
    assert [(o.token_ids, o.logprobs) for o in outputs[3:]] == [alone, alone]
    other = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True, presence_penalty=1e-9)
    assert solo(PROMPTS[3], other)[0] != alone[0], "vacuous: the seed decides nothing"


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    """No seed is given, and nothing that leaves the distribution alone may change the sample."""
    long = solo(PROMPTS[3], SamplingParams(max_tokens=16, temperature=1, ignore_eos=True))
    for change in ({}, {"logprobs": 3}, {"detokenize": False}, {"temperature": 1.0}):
        params = {"max_tokens": 7, "temperature": 1, "ignore_eos": True} | change
        tokens, logprobs = solo(PROMPTS[3], SamplingParams(**params))
        assert (tokens, logprobs) == (long[0][:7], long[1][:7])
    assert len(set(long[0])) > 4, "vacuous: nothing was drawn"


def test_ordinary_requests_without_a_seed_vary() -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True)
    outputs = make_engine().generate([PROMPTS[3]] * 4, params, deterministic=False)
    assert len({tuple(o.token_ids) for o in outputs}) > 1


def test_abort_frees_everything_and_disturbs_nobody() -> None:
    engine = make_engine(NoisyModel(), small_config(prefix_cache=False))
    free = engine._pool.num_free
    ids = [engine.submit(p, SamplingParams(max_tokens=20)) for p in PROMPTS]
    done = {}
    for step in range(200):
        if step in (2, 5, 9):
            assert engine.abort(ids[step % 8])
        done |= {o.request_id: o for o in engine.step() if o.finished}
    assert not engine.has_unfinished()
    assert not engine.abort(ids[0])
    assert engine._pool.num_free == free
    for i, prompt in enumerate(PROMPTS):
        if i not in (2, 5, 1):
            assert done[ids[i]].token_ids == reference(prompt, 20)


def test_generate_keeps_what_other_requests_say_for_the_next_step() -> None:
    engine = make_engine()
    other = engine.submit(PROMPTS[2], SamplingParams(max_tokens=5, ignore_eos=True))
    engine.generate([PROMPTS[4]], SamplingParams(max_tokens=30, ignore_eos=True))
    said: list[int] = []
    while engine.has_unfinished() or not said:
        said += [t for o in engine.step() if o.request_id == other for t in o.new_token_ids]
    assert said == reference(PROMPTS[2], 5, frozenset())


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([1, VOCAB], {}, "outside the vocabulary"),
        ([-1], {}, "outside the vocabulary"),
        ([1.5], {}, "sequence of token ids"),
        (["a"], {}, "sequence of token ids"),
        ([True], {}, "sequence of token ids"),
        (None, {}, "sequence of token ids"),
        ([1] * 256, {}, "exceed the context"),
        ([1] * 200, {"max_tokens": 57}, "exceed the context"),
        ([1] * 4, {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1] * 4, {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ([1] * 250, {"min_tokens": 10}, "min_tokens"),
    ],
)
def test_bad_requests_are_refused_and_nothing_else_suffers(prompt, params, message) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine()
    good = engine.submit(PROMPTS[3], SamplingParams(max_tokens=6))
    with pytest.raises(RequestError, match=message) as caught:
        engine.submit(prompt, SamplingParams(**params))
    assert "\n" not in str(caught.value)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert outputs[-1].request_id == good
    assert outputs[-1].token_ids == reference(PROMPTS[3], 6)


def test_a_request_that_can_never_fit_the_kv_budget_is_refused() -> None:
    engine = make_engine(config=small_config(num_pages=5))
    with pytest.raises(RequestError, match="KV pages"):
        engine.submit([1] * 10, SamplingParams(max_tokens=11))
    (output,) = engine.generate([[1] * 10], SamplingParams(max_tokens=10, ignore_eos=True))
    assert len(output.token_ids) == 10


@pytest.mark.parametrize(("num_pages", "room", "limit"), [(5, 10, "kv_cache"), (80, 246, "context")])
def test_without_max_tokens_a_request_gets_what_fits(num_pages: int, room: int, limit: str) -> None:
    engine = make_engine(config=small_config(num_pages=num_pages))
    (output,) = engine.generate([[1] * 10], SamplingParams(ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason, output.limit) == (room, "length", limit)
    wide = make_engine(config=small_config(num_pages=80))
    (whole,) = wide.generate([[1] * 10], SamplingParams(ignore_eos=True))
    assert (output.token_ids, output.logprobs) == (whole.token_ids[:room], whole.logprobs[:room])


def test_an_output_names_the_limit_only_if_one_ended_it() -> None:
    engine = make_engine()
    (output,) = engine.generate([[1] * 10], SamplingParams(max_tokens=3, ignore_eos=True))
    assert (output.finish_reason, output.limit) == ("length", "max_tokens")
    stop = output.token_ids[1]
    (output,) = engine.generate([[1] * 10], SamplingParams(max_tokens=3, stop_token_ids=(stop,)))
    assert (output.finish_reason, output.limit) == ("stop", None)


def test_a_prompt_that_fills_the_kv_budget_is_refused() -> None:
    engine = make_engine(config=small_config(num_pages=5))
    with pytest.raises(RequestError, match="raise kv_cache_bytes") as caught:
        engine.submit([1] * 20, SamplingParams())
    assert "\n" not in str(caught.value)
    assert engine.submit([1] * 19, SamplingParams())


def test_the_most_likely_tokens_of_a_step_are_one_call() -> None:
    class Counting(ToySampler):
        calls: ClassVar[list[tuple[int, int]]] = []

        def top_logprobs(self, logits, k):  # type: ignore[no-untyped-def]
            self.calls.append((logits.shape[0], k))
            return super().top_logprobs(logits, k)

    wanted = [2, 2, 0, 2, 5]
    params = [SamplingParams(max_tokens=4, ignore_eos=True, logprobs=k) for k in wanted]
    prompts = [[3 + i, 4, 5] for i in range(5)]
    engine = make_engine(sampler=Counting())
    outputs = engine.generate(prompts, params)
    tops = [len(t) for o in outputs for t in o.top_logprobs or []]
    assert sorted(tops) == sorted(k for k in wanted for _ in range(4))
    assert sum(rows for rows, _ in Counting.calls) >= 16
    steps = engine.stats().fast_steps + engine.stats().verifier_steps
    assert len(Counting.calls) <= steps < sum(rows for rows, _ in Counting.calls)
    for prompt, p, output in zip(prompts, params, outputs, strict=True):
        (alone,) = make_engine().generate([prompt], p)
        assert alone.top_logprobs == output.top_logprobs


def test_a_waiting_prompt_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, ...]] = []
    key = BlockPool.key

    def counting(self: BlockPool, parent: bytes | None, tokens: Sequence[int]) -> bytes:
        hashed.append(tuple(tokens))
        return key(self, parent, tokens)

    monkeypatch.setattr(BlockPool, "key", counting)
    engine = make_engine(config=small_config(num_pages=16))
    common = [9] * 16
    engine.generate([common], SamplingParams(max_tokens=1))  # so that the waiting prompt's pages are known
    engine.submit(common + [1] * 8, SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(4):
        engine.step()
    hashed.clear()
    waiting = engine.submit([*common, *([2] * 20)], SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(8):
        engine.step()
    assert engine._requests[waiting].state is State.WAITING
    assert hashed.count(tuple(common[:4])) == 4, "the four known pages, each once"


def test_other_mistakes_at_submit() -> None:
    engine = make_engine()
    engine.submit([1], request_id="a")
    with pytest.raises(RequestError, match="in use"):
        engine.submit([1], request_id="a")
    with pytest.raises(RequestError, match="request_id"):
        engine.submit([1], request_id=5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="SamplingParams"):
        engine.submit([1], {"temperature": 1})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="parameters"):
        engine.generate([[1]], [])
    with pytest.raises(ContractMismatchError, match="pins contract"):
        engine.submit([1], contract="0" * 64)
    engine.submit([1], contract=engine.contract.hash)
    engine.submit([1], contract=engine.contract)
    config = small_config()
    fixed = (config.verify_tokens, config.verify_seqs, config.rows)
    no_text = Engine(ToyModel(), ToyModel(fixed=fixed), config, sampler=ToySampler())
    with pytest.raises(RequestError, match="tokenizer"):
        no_text.submit([1], SamplingParams(stop=("x",)))


def test_a_bad_prompt_in_generate_leaves_nothing_behind() -> None:
    engine = make_engine()
    with pytest.raises(RequestError):
        engine.generate([[1], []])
    assert not engine.has_unfinished()


def test_models_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="vocabularies"):
        make_engine(ToyModel(vocab_size=VOCAB + 1))
    with pytest.raises(ConfigError, match="one page"):
        make_engine(config=small_config(num_pages=None, kv_cache_bytes=100))


# -- failures inside one request -----------------------------------------------------------------------------


def _explode(ids: list[int], row: torch.Tensor) -> torch.Tensor:
    if len(ids) >= 12:
        raise KeyError("boom")
    return row


def _wrong_shape(ids: list[int], row: torch.Tensor) -> torch.Tensor:
    return row[:3]


def _all_forbidden(ids: list[int], row: torch.Tensor) -> torch.Tensor:
    return torch.full_like(row, -math.inf)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("fast", [ToyModel, NoisyModel])
@pytest.mark.parametrize(
    ("processor", "message"),
    [(_explode, "KeyError: 'boom'"), (_wrong_shape, "shape"), (_all_forbidden, "no token can be chosen")],
)
def test_a_failing_logits_processor_fails_its_request_only(
    processor, message: str, fast: type[ToyModel], deterministic: bool
) -> None:  # type: ignore[no-untyped-def]
    engine = make_engine(fast())
    good = SamplingParams(max_tokens=12)
    bad = SamplingParams(max_tokens=12, logits_processors=(processor,), ignore_eos=True)
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[4]]
    outputs = engine.generate(prompts, [good, bad, good], deterministic=deterministic)
    assert outputs[1].finish_reason == "error"
    assert message in (outputs[1].error or "")
    if deterministic:
        assert outputs[0].token_ids == reference(prompts[0], 12)
        assert outputs[2].token_ids == reference(prompts[2], 12)
        expected = 12 - len(PROMPTS[2]) if processor is _explode else 0
        assert outputs[1].token_ids == reference(prompts[1], expected, frozenset())
    assert engine.stats().failed == 1


@pytest.mark.parametrize("verify", ["auto", "always"])
def test_nan_logits_fail_their_request_only(verify: str) -> None:
    class NanModel(ToyModel):
        def disturb_logits(self, batch, logits):  # type: ignore[no-untyped-def]
            for i, row in enumerate(batch.rows):
                if batch.n and batch.ids[row] == 13:
                    logits[i, 5] = math.nan
            return logits

    engine = make_engine(NanModel(), small_config(verify=verify))
    engine._verifier = NanModel(fixed=(12, 4, 12))
    outputs = engine.generate([PROMPTS[1], [1, 2, 13], PROMPTS[4]], SamplingParams(max_tokens=1))
    assert outputs[1].finish_reason == "error"
    assert "NaN" in (outputs[1].error or "")
    assert [o.token_ids for o in (outputs[0], outputs[2])] == [
        reference(p, 1) for p in (PROMPTS[1], PROMPTS[4])
    ]


def test_nan_of_the_fast_path_alone_does_not_fail_a_deterministic_request() -> None:
    class NanFast(NoisyModel):
        def disturb_logits(self, batch, logits):  # type: ignore[no-untyped-def]
            logits = super().disturb_logits(batch, logits)
            logits[self.calls % 3 :: 3] = math.nan
            return logits

    engine = make_engine(NanFast())
    outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=12))
    assert [o.token_ids for o in outputs] == [reference(p, 12) for p in PROMPTS]


def test_a_failing_detokenizer_fails_its_request_only() -> None:
    seen = reference(PROMPTS[4], 20, frozenset())[9]

    def decode(ids: list[int]) -> str:
        if seen in ids:
            raise UnicodeError("no text")
        return toy_decode(ids)

    engine = make_engine(NoisyModel(), decode=decode)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    quiet = SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False)
    first, second = engine.submit(PROMPTS[4], params), engine.submit(PROMPTS[4], quiet)
    done = {}
    while engine.has_unfinished():
        done |= {o.request_id: o for o in engine.step() if o.finished}
    full = reference(PROMPTS[4], 20, frozenset())
    assert (done[first].finish_reason, done[first].error) == ("error", "UnicodeError: no text")
    assert done[first].token_ids == full[: full.index(seen) + 1]
    assert done[second].token_ids == full


def test_stats_can_be_printed() -> None:
    engine = make_engine(NoisyModel())
    engine.generate(PROMPTS, SamplingParams(max_tokens=6))
    stats = engine.stats().as_dict()
    assert stats["finished"] == len(PROMPTS)
    assert stats["seconds_total"] >= stats["seconds_overhead"] >= 0
