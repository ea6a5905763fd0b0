"""Drafts: whatever is proposed, a request gives its solo run's bits; what is right comes in few passes."""

from __future__ import annotations

import dataclasses

import pytest
from toy import EOS, VOCAB, NoisyModel, ToyModel, expected_digest, make_engine, small_config, solo

from llm42c.errors import RequestError
from llm42c.runtime import engine as engine_module
from llm42c.runtime.accept import accept
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.request import Request
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.scheduler import Scheduler

PROMPT = [(3 * j + 1) % VOCAB for j in range(9)]
LENGTH = 24
PARAMS = {
    "greedy": SamplingParams(max_tokens=LENGTH, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=LENGTH, ignore_eos=True, temperature=0.9, seed=4),
    "penalties": SamplingParams(
        max_tokens=LENGTH, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=3
    ),
    "stops": SamplingParams(
        max_tokens=LENGTH, logit_bias={0: 5.0, 1: 5.0}, stop=("ABBA", "BBB"), min_tokens=4
    ),
    "processor": SamplingParams(
        max_tokens=LENGTH, ignore_eos=True, logits_processors=(lambda ids, row: row.roll(ids[-1] % 3),)
    ),
}
MODES = {
    "certified": (ToyModel, {"certify": "startup"}),
    "verified": (ToyModel, {"verify": "always"}),
    "speculative": (lambda: NoisyModel(flip=0.2), {"certify": "startup"}),
    "subtle": (lambda: NoisyModel(flip=0.0), {"certify": "startup"}),
}


def run(engine: Engine, draft: list[int] | None, params: SamplingParams) -> RequestOutput:
    engine.submit(PROMPT, params, draft=draft)
    while True:
        for output in engine.step():
            for request in engine._scheduler.running:
                assert not request.proposal.drafted
                digest = engine.kv_digest(request.id)
                assert digest == expected_digest(request.history.tokens, request.lease.num_computed)
            if output.finished:
                return output


def adversaries(right: list[int]) -> dict[str, list[int]]:
    drafts = {"right": right, "too long": right + [5] * 40, "none": [], "past the end": right + right}
    for i in range(len(right)):
        drafts[f"wrong at {i}"] = [*right[:i], (right[i] + 1) % VOCAB, *right[i + 1 :]]
        drafts[f"stops at {i}"] = [*right[:i], EOS, *right[i + 1 :]]
    return drafts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PARAMS)
def test_no_draft_changes_a_bit(name: str, mode: str) -> None:
    fast, changes = MODES[mode]
    params = PARAMS[name]
    (plain,) = make_engine(config=small_config(verify="always")).generate([PROMPT], params)
    engine = make_engine(fast(), small_config(**changes))
    for draft in adversaries(plain.token_ids).values():
        output = run(engine, draft, params)
        assert (output.token_ids, output.logprobs) == (plain.token_ids, plain.logprobs)
        assert output.top_logprobs == plain.top_logprobs
        assert (output.text, output.finish_reason, output.stop_reason) == (
            *(plain.text, plain.finish_reason, plain.stop_reason),
        )
    stats = engine.stats()
    assert 0 < stats.accepted_drafts < stats.drafted_tokens


@pytest.mark.parametrize(("mode", "most"), [("certified", 5), ("verified", 4), ("subtle", 4)])
def test_a_right_draft_takes_few_passes(mode: str, most: int) -> None:
    fast, changes = MODES[mode]
    engine = make_engine(fast(), small_config(**changes))
    right, _ = solo(PROMPT, PARAMS["greedy"])
    before = engine.stats().steps
    run(engine, right, PARAMS["greedy"])
    assert engine.stats().steps - before <= most
    assert engine.stats().accepted_drafts >= LENGTH - 2 * most


def test_a_draft_survives_a_preemption() -> None:
    engine = make_engine(config=small_config(certify="startup"))
    right, logprobs = solo(PROMPT, PARAMS["greedy"])
    request_id = engine.submit(PROMPT, PARAMS["greedy"], draft=right)
    engine.step()
    request = engine._requests[request_id]
    assert 0 < request.num_outputs < LENGTH
    engine._scheduler.preempt(request)
    before = engine.stats().steps
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert engine.stats().steps - before <= 4
    assert (outputs[-1].token_ids, outputs[-1].logprobs) == (right, logprobs)


def test_drafts_preempt_nobody_and_give_their_pages_back() -> None:
    """Four requests that just fit; drafts of them all would not."""
    right, _ = solo(PROMPT, PARAMS["greedy"])
    wrong = [*right[:1], *((t + 1) % VOCAB for t in right[1:])]
    counts = []
    for draft in (None, wrong, right):
        engine = make_engine(config=small_config(certify="startup", num_pages=21, prefix_cache=False))
        params = dataclasses.replace(PARAMS["greedy"], max_tokens=6)
        for _ in range(4):
            engine.submit(PROMPT, params, draft=draft)
        while engine.has_unfinished():
            engine.step()
            for request in engine._scheduler.running:
                assert len(request.lease.pages) <= -(-request.num_tokens // engine.config.page_size)
        counts.append(engine.stats().preemptions)
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("draft", ["abc", [1.5], [VOCAB], [-1], {1}, 7])
def test_what_is_no_draft_is_refused(draft: object) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=r"draft must be a sequence of token ids|outside the vocabulary"):
        engine.submit(PROMPT, draft=draft)  # type: ignore[arg-type]
    assert not engine.has_unfinished()
    with pytest.raises(RequestError, match="deterministic"):
        engine.submit(PROMPT, deterministic=False, draft=[1])


def test_an_accept_that_takes_one_token_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""

    def greedy(chunk, sampled, first, origin):  # type: ignore[no-untyped-def]
        pending = chunk.request.proposal.tokens
        rows = range(first, first + min(chunk.num_rows, len(pending)))
        wrong = next((j for j, r in enumerate(rows) if sampled.tokens[r] != pending[j]), None)
        if wrong is not None:
            pending[wrong] = sampled.tokens[first + wrong]  # as if it had been right: the next row counts too
        return accept(chunk, sampled, first, origin)

    monkeypatch.setattr(engine_module, "accept", greedy)
    with pytest.raises(AssertionError):
        test_no_draft_changes_a_bit("greedy", "certified")


def test_a_page_that_is_shared_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the first rejected position counts as computed, so that its page may be full."""

    def hasty(chunk, sampled, first, origin):  # type: ignore[no-untyped-def]
        verdict = accept(chunk, sampled, first, origin)
        request = chunk.request
        request.lease.num_computed = min(chunk.end, len(request.history.tokens))
        return verdict

    monkeypatch.setattr(engine_module, "accept", hasty)
    with pytest.raises(AssertionError):
        test_no_draft_changes_a_bit("greedy", "certified")


def test_a_page_that_is_shared_before_it_is_full_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: who takes it from the prefix cache reads a position that nobody has computed."""
    share = Scheduler.share

    def early(self: Scheduler, request: Request) -> None:
        lease, computed = request.lease, request.lease.num_computed
        lease.num_computed = min(len(request.history.tokens), len(lease.pages) * 4)
        share(self, request)
        lease.num_computed = computed

    def second_reader() -> int:
        """Requests that continue the text of one that was dropped when the text filled a page."""
        hits = 0
        for full in (12, 16, 20):
            engine = make_engine(config=small_config(certify="startup"))
            first = engine.submit(PROMPT, PARAMS["greedy"])
            while len(tokens := engine._requests[first].history.tokens) < full:
                engine.step()
            prompt = [*tokens[:full], 5]
            engine.abort(first)
            name = engine.submit(prompt, PARAMS["sampled"])
            done = {}
            while engine.has_unfinished():
                done |= {o.request_id: o for o in engine.step() if o.finished}
            assert (done[name].token_ids, done[name].logprobs) == solo(prompt, PARAMS["sampled"])
            hits += engine.stats().prefix_hits
        return hits

    assert second_reader() > 0, "vacuous: nothing was shared"
    monkeypatch.setattr(Scheduler, "share", early)
    with pytest.raises(AssertionError):
        second_reader()
