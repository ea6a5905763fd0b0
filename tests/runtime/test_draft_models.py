"""Models that draft: they change no bit, whatever their keys and values hold, and one pass serves all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from toy import VOCAB, Flat, NoisyModel, ToyModel, expected_digest, make_engine, small_config, solo

from llm42c.errors import ConfigError, RequestError
from llm42c.runtime.draft_models import BuiltDraft, DraftModels, EngineCache, Reader
from llm42c.runtime.drafters import SelfDraft, drafter_source
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.stats import Stats
from llm42c.runtime.step_times import Ledger

PROMPT = [(3 * j + 1) % VOCAB for j in range(9)]
LENGTH = 30
GREEDY = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
PARAMS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(max_tokens=LENGTH, ignore_eos=True, temperature=0.9, top_p=0.9, seed=4),
    "penalties": SamplingParams(max_tokens=LENGTH, ignore_eos=True, repetition_penalty=1.3, logprobs=3),
    "stops": SamplingParams(max_tokens=LENGTH, logit_bias={0: 5.0, 1: 5.0}, stop=("ABBA",), min_tokens=4),
}
MODES: dict[str, tuple[Callable[[], ToyModel], dict[str, Any]]] = {
    "certified": (ToyModel, {"certify": "startup"}),
    "verified": (ToyModel, {"verify": "always"}),
    "speculative": (lambda: NoisyModel(flip=0.2), {"certify": "startup"}),
}
SPECS = ("self", "model:toy")
NOISY = lambda: NoisyModel(flip=0.3)  # noqa: E731


def drafting(drafts: Callable[[], ToyModel], mode: str = "certified", **changes: Any) -> Engine:
    fast, how = MODES[mode]
    engine = make_engine(fast(), small_config(**(how | changes)), drafts=drafts)
    engine._speculator.times = Flat()
    return engine


def finish(engine: Engine, checked: bool = True) -> dict[str, RequestOutput]:
    """Step until all is done; after each step canonical keys and values are what the tokens imply."""
    done = {}
    while engine.has_unfinished():
        done |= {o.request_id: o for o in engine.step() if o.finished}
        for request in engine._scheduler.running if checked else ():
            digest = engine.kv_digest(request.id)
            assert digest == expected_digest(request.history.tokens, request.lease.num_computed)
    return done


def bits(output: RequestOutput) -> tuple[list[int], list[float]]:
    return output.token_ids, output.logprobs


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS)
def test_a_draft_model_changes_no_bit(spec: str, mode: str, params: str) -> None:
    engine = drafting(NOISY, mode)
    engine.submit(PROMPT, PARAMS[params], speculate=spec, request_id="one")
    engine.submit(PROMPT[:4], PARAMS[params], speculate=spec, request_id="two")
    engine.submit(PROMPT[:3], PARAMS[params], request_id="three")
    done = finish(engine)
    for name, prompt in (("one", PROMPT), ("two", PROMPT[:4]), ("three", PROMPT[:3])):
        assert bits(done[name]) == solo(prompt, PARAMS[params])
    stats = engine.stats()
    assert stats.seconds_draft > 0
    assert stats.drafted_tokens > 0, "vacuous"
    assert stats.draft_weight_bytes == 1000
    assert (stats.draft_kv_bytes > 0) == (spec != "self")


@pytest.mark.parametrize("params", ["greedy", "sampled"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_model_that_is_right_is_believed(spec: str, params: str) -> None:
    """The same weights and the same noise: every guess comes true, so the drafter's keys and values are right
    after accepted guesses, unseen tokens and steps without a question."""
    engine = drafting(ToyModel)
    engine.submit(PROMPT, PARAMS[params], speculate=spec, request_id="r")
    assert bits(finish(engine)["r"]) == solo(PROMPT, PARAMS[params])
    stats = engine.stats()
    assert stats.drafted_tokens == stats.accepted_drafts >= LENGTH // 2
    assert stats.fast_steps < LENGTH // 2


def test_keys_and_values_that_are_not_rolled_back_cost_acceptance_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control of the roll-back: without it right models are wrong, and outputs are the same."""

    class Wrong(ToyModel):
        """Wrong about every other token, so that there is something to roll back."""

        def disturb_logits(self, batch: Any, logits: Any) -> Any:
            logits = logits.copy()
            for i, row in enumerate(batch.rows):
                if batch.n and int(batch.positions[row]) % 2:
                    logits[i] = -logits[i]
            return logits

    turns = itertools.count()  # while drafts rest, tokens come that the drafter does not see
    monkeypatch.setattr(Ledger, "rests", lambda self, requests: next(turns) % 3 > 0)
    accepted = []
    for kept in (False, True):
        if kept:
            monkeypatch.setattr(Reader, "catch_up", _forgets_nothing)
        engine = drafting(Wrong)
        engine.submit(PROMPT, GREEDY, speculate="model:toy", request_id="r")
        assert bits(finish(engine)["r"]) == solo(PROMPT, GREEDY)
        accepted.append(engine.stats().accepted_drafts)
    assert accepted[1] < accepted[0], accepted


def _forgets_nothing(reader: Reader) -> None:
    now = reader._request.num_tokens
    reader.computed = min(reader.computed, now - 1)
    reader.known, reader.guess = now, []


def test_a_drafter_that_writes_over_committed_positions_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the digests above: one position too early in the engine's cache."""
    opened = EngineCache.open

    def early(self: EngineCache, reader: Reader, *rest: Any) -> int:
        count = opened(self, reader, *rest)
        reader.computed -= 1
        return count

    monkeypatch.setattr(EngineCache, "open", early)
    engine = drafting(NOISY)
    engine.submit(PROMPT, GREEDY, speculate="self")
    with pytest.raises(AssertionError):
        finish(engine)


@pytest.mark.parametrize("spec", SPECS)
def test_one_pass_serves_all_requests(spec: str) -> None:
    models: list[ToyModel] = []

    def made() -> ToyModel:
        models.append(ToyModel())
        return models[-1]

    engine = drafting(made)
    names = [engine.submit(PROMPT[:n], GREEDY, speculate=spec) for n in (3, 5, 8)]
    done = finish(engine)
    assert [bits(done[n]) for n in names] == [solo(PROMPT[:n], GREEDY) for n in (3, 5, 8)]
    (model,) = models
    assert any(rows == 3 for _, _, rows in model.shapes)
    assert model.calls < engine.stats().drafted_tokens / 2


def test_drafts_of_a_model_preempt_nobody() -> None:
    engine = drafting(ToyModel, num_pages=17, prefix_cache=False)
    names = [engine.submit(PROMPT, GREEDY, speculate=spec) for spec in ("self", "model:toy", "self")]
    plain = make_engine(config=small_config(certify="startup", num_pages=17, prefix_cache=False))
    for _ in names:
        plain.submit(PROMPT, GREEDY)
    expected = solo(PROMPT, GREEDY)
    assert all(bits(o) == expected for o in finish(engine).values())
    finish(plain)
    assert engine.stats().preemptions <= plain.stats().preemptions > 0


def test_a_long_prompt_is_read_in_pieces_and_pages_come_back() -> None:
    """With a cache of its own, too small for two requests at a time."""
    prompt = [(7 * j) % VOCAB for j in range(70)]
    engine = drafting(ToyModel, num_pages=40)
    for i in range(3):
        engine.submit(prompt, GREEDY, speculate="model:toy", request_id=str(i))
        assert bits(finish(engine)[str(i)]) == solo(prompt, GREEDY)
        assert engine.stats().accepted_drafts > (i + 1) * LENGTH // 3
    assert engine.stats().drafted_tokens == engine.stats().accepted_drafts


def test_a_drafter_with_a_shorter_context_stops_there() -> None:
    engine = drafting(lambda: ToyModel(max_position_embeddings=20))
    engine.submit(PROMPT, GREEDY, speculate="model:toy", request_id="r")
    assert bits(finish(engine)["r"]) == solo(PROMPT, GREEDY)
    assert 0 < engine.stats().accepted_drafts <= 20 - len(PROMPT)


def test_what_cannot_draft_is_refused_in_one_line() -> None:
    engine = drafting(lambda: ToyModel(vocab_size=VOCAB + 1))
    with pytest.raises(RequestError, match=r"model:other cannot draft: its vocabulary has 49 tokens"):
        engine.submit(PROMPT, GREEDY, speculate="model:other")
    assert not engine.has_unfinished()
    with pytest.raises(ConfigError, match="q4_0"):
        drafter_source("self:q3")
    with pytest.raises(ConfigError, match="model:PATH"):
        drafter_source("model:")
    for build, one_rank, why in ((None, True, "build_engine"), (_built, False, "one rank")):
        toy = ToyModel()
        models = DraftModels(
            *(build, toy, toy.new_kv_cache(4, 4), 4, 4, small_config(), None, Stats()),  # type: ignore[arg-type]
            one_rank=one_rank,
        )
        with pytest.raises(ConfigError, match=why) as refused:
            models.of(SelfDraft())
        assert "\n" not in str(refused.value)


def _built(spec: Any) -> BuiltDraft:
    return BuiltDraft(ToyModel())
