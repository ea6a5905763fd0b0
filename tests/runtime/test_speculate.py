"""Drafters: what n-grams propose, when a step takes drafts, and that a bad drafter does nothing to others."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy import VOCAB, Flat, ToyModel, make_engine, small_config, solo

from llm42c.errors import ConfigError, RequestError
from llm42c.parallel.ranks import Ranks
from llm42c.runtime import guesses, step_times
from llm42c.runtime.door import Door
from llm42c.runtime.drafters import Corpus, NgramDrafter, drafter_source
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.speculate import Speculator
from llm42c.runtime.stats import Stats
from llm42c.runtime.step_times import Ledger, StepTimes

PROMPT = [(3 * j + 1) % VOCAB for j in range(9)]
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)
REPETITIVE = SamplingParams(max_tokens=60, ignore_eos=True, logit_bias={0: 40.0})
SIZES = (1, 2, 4, 8, 16, 32)


def no_pages(request: Any, positions: int) -> int:
    return 0


def by_search(tokens: list[int], k: int) -> list[int]:
    """What NgramDrafter promises, by looking through all of the text."""
    for n in (4, 3, 2):
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) >= n and tokens[end - n : end] == tokens[len(tokens) - n :]:
                period = tokens[end:]
                return [period[i % len(period)] for i in range(k)]
    return []


def test_ngrams_propose_what_followed_last_time() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        tokens = rng.integers(0, 4, 60).tolist()
        drafter, grown, some = NgramDrafter(), 0, 0
        while grown < len(tokens):
            grown += int(rng.integers(1, 4))
            guess = drafter.propose(tokens[:grown], 5)
            assert guess == by_search(tokens[:grown], 5)
            some += bool(guess)
        assert some > 10, "vacuous"
        assert drafter.propose(tokens[:20], 5) == by_search(tokens[:20], 5)  # outputs were taken back


def test_ngrams_look_at_each_token_once() -> None:
    class Counted(list):  # type: ignore[type-arg]
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    tokens: Counted = Counted()
    drafter = NgramDrafter()
    for i in range(2000):
        tokens.append(i % 97)
        drafter.propose(tokens, 4)
    assert Counted.reads < 12 * len(tokens)


def test_a_repeated_text_is_continued_for_as_long_as_is_asked() -> None:
    assert NgramDrafter().propose([1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert NgramDrafter(most=2).propose([1, 2, 3, 1, 2], 7) == [3, 1]
    assert NgramDrafter().propose([1, 2, 3], 7) == []


def test_a_corpus_is_asked_where_the_request_s_own_text_says_less() -> None:
    corpus = Corpus([[1, 2, 3, 4, 5, 6], [9, 9, 9, 1, 2, 3, 7], [8]])
    drafter = NgramDrafter(corpus=corpus)
    assert drafter.propose([0, 1, 2, 3], 4) == [7], "the latest text that holds it, and not beyond its end"
    assert NgramDrafter(corpus=corpus).propose([2, 3, 4], 9) == [5, 6]
    assert NgramDrafter(corpus=corpus).propose([2, 3], 9) == [], "two tokens say too little"
    assert NgramDrafter(corpus=corpus).propose([6, 9, 9], 9) == [], "no text begins in the one before"
    assert NgramDrafter(corpus=corpus).propose([7, 3, 4, 40, 3, 4], 2) == [40, 3]
    own = [1, 2, 3, 4, 41, 1, 2, 3, 4]
    assert NgramDrafter(corpus=corpus).propose(own, 2) == [41, 1], "of equal matches the request's own counts"
    assert Corpus([]).after([1, 2, 3, 4], 3) == ([], 0)
    with pytest.raises(ConfigError, match="token ids"):
        Corpus([["a"]])  # type: ignore[list-item]


def test_a_corpus_finds_what_a_search_finds() -> None:
    rng = np.random.default_rng(4)
    texts = [rng.integers(0, 5, 40).tolist() for _ in range(3)]
    corpus, found = Corpus(texts), 0
    for _ in range(200):
        newest = rng.integers(0, 5, 4).tolist()
        expected: list[int] = []
        for text, n in [(t, n) for n in (4, 3) for t in reversed(texts)]:
            ends = [e for e in range(n, len(text) + 1) if text[e - n : e] == newest[-n:]]
            if ends:
                expected = text[ends[-1] : ends[-1] + 3]
                break
        assert corpus.after(newest, 3)[0] == expected
        found += bool(expected)
    assert 20 < found < 200


def test_requests_share_a_corpus() -> None:
    plain = solo(PROMPT, PARAMS)
    steps = {}
    for corpus in (Corpus([[*PROMPT, *plain[0]]]), Corpus([[1, 2, 3]])):
        engine = make_engine(config=small_config(certify="startup", speculate=corpus))
        engine._speculator.times = Flat()
        outputs = engine.generate([PROMPT, PROMPT], PARAMS)
        assert [(o.token_ids, o.logprobs) for o in outputs] == [plain] * 2
        steps[corpus] = engine.stats().steps
    assert 2 * min(steps.values()) < max(steps.values())


class Oracle:
    """Proposes right tokens, of which it gets `wrong` in every ten wrong."""

    def __init__(self, right: Sequence[int], wrong: int = 0) -> None:
        self.right, self.wrong = list(right), wrong

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        at = len(tokens)
        return [(t + (i % 10 < self.wrong)) % VOCAB for i, t in enumerate(self.right[at : at + k], start=at)]


def fake_request(drafter: Any, tokens: list[int]) -> Any:
    """As much of a request as a speculator looks at; weakly referable."""

    class Fake(SimpleNamespace):
        __hash__ = object.__hash__
        num_tokens = property(lambda self: len(self.history.tokens))

    history, proposal = SimpleNamespace(tokens=tokens), SimpleNamespace(tokens=[])
    return Fake(history=history, proposal=proposal, drafter_source=drafter_source(drafter))


def taken(seconds: dict[int, float], wrong: int, tokens: int = 1, steps: int = 60) -> list[int]:
    """Drafted tokens of each step, where steps of so many tokens take `seconds`."""
    right = list(np.random.default_rng(0).integers(0, VOCAB, 4000))
    speculator, counts = Speculator(VOCAB, Stats()), []
    request = fake_request(Oracle(right, wrong), right[:5])
    for size, s in seconds.items():
        speculator.times.took(size, s)
    for _ in range(steps):
        (draft,) = speculator.choose([request], tokens, [s for s in SIZES if s >= tokens], 31, no_pages)
        counts.append(len(draft))
        done = request.history.tokens
        accepted = next((i for i, t in enumerate(draft) if t != right[len(done) + i]), len(draft))
        request.history.tokens = right[: len(done) + accepted + 1]
    return counts


FLAT = {1: 1.0, 2: 1.0, 4: 1.02, 8: 1.05, 16: 1.1, 32: 1.2}
STEEP = {s: float(s) for s in SIZES}


def test_drafts_are_as_long_as_pays() -> None:
    assert min(taken(FLAT, wrong=0)[5:]) >= 15
    assert sum(taken(FLAT, wrong=5)[20:]) < sum(taken(FLAT, wrong=0)[20:]) / 2
    assert not any(taken(STEEP, wrong=0)), "rows cost what they bring"
    assert sum(taken({1: 1.0, 2: 1.3, 4: 1.9, 8: 3.0}, wrong=9)[20:]) <= 4, "nothing is accepted"


def test_drafts_rest_where_they_cost_time() -> None:
    ledger = Ledger()

    def steps_until_rest(saved: float) -> int:
        for step in range(1, 1000):
            if ledger.rests(8):
                return step - 1
            ledger.took(8, saved, 1.0)
        return 1000

    def rest() -> int:
        return next(i for i in itertools.count(1) if not ledger.rests(8))

    assert steps_until_rest(-0.1) == step_times.TRIAL
    first = rest()
    assert steps_until_rest(-0.1) <= step_times.TRIAL
    assert rest() >= 2 * first >= step_times.FIRST_REST
    assert not ledger.rests(1), "of other batches nothing is known"
    assert steps_until_rest(-0.004) == 1000, "what questions may cost"
    assert steps_until_rest(0.1) == 1000


def test_wrong_predictions_lose_little() -> None:
    """Steps with drafts take twice as long as measured, and bring half a token: what is lost is bounded."""
    right = list(np.random.default_rng(0).integers(0, VOCAB, 9000))
    speculator, spent, plain = Speculator(VOCAB, Stats()), 0.0, 0.0
    request = fake_request(Oracle(right, 5), right[:5])
    for size in SIZES:
        speculator.times.took(size, 1.0)
    speculator.times.took = lambda size, seconds: None  # type: ignore[method-assign]
    for _ in range(6000):
        (draft,) = speculator.choose([request], 1, SIZES, 31, no_pages)
        done = request.history.tokens
        accepted = next((i for i, t in enumerate(draft) if t != right[len(done) + i]), len(draft))
        request.history.tokens = right[: len(done) + accepted + 1]
        seconds = (accepted + 1) * 1.25 if draft else 1.0
        speculator.took(SIZES[0], 1, 1 + len(draft), seconds, accepted + 1)
        spent, plain = spent + seconds, plain + accepted + 1
        if len(request.history.tokens) > 8900:
            break
    assert plain < spent < 1.03 * plain


def test_times_between_measured_sizes_lie_on_a_line() -> None:
    times = StepTimes()
    assert times.of(4) == 0
    times.took(2, 1.0)
    assert times.of(1) == times.of(2) == 1.0
    assert times.of(4) > 1.0
    times.took(6, 3.0)
    assert times.of(4) == 2.0
    for seconds in (9.0, 3.0, 3.1):  # one late step is no measurement
        times.took(6, seconds)
    assert times.of(6) <= 3.1


def test_speculation_changes_no_bit_and_saves_steps() -> None:
    steps = {}
    plain = solo(PROMPT, REPETITIVE)
    for how in (None, "ngram", "auto", Oracle([*PROMPT, *plain[0]])):
        engine = make_engine(config=small_config(certify="startup", speculate=how))
        engine._speculator.times = Flat()
        (output,) = engine.generate([PROMPT], REPETITIVE)
        assert (output.token_ids, output.logprobs) == plain
        steps[str(how)] = engine.stats().steps
        assert (engine.stats().accepted_drafts > 0) == (how is not None)
    assert max(list(steps.values())[1:]) < steps["None"] / 2, steps


def test_speculation_fills_what_the_verifier_computes_anyway() -> None:
    plain = solo(PROMPT, PARAMS)
    engine = make_engine(config=small_config(verify="always"))
    engine.submit(PROMPT, PARAMS, speculate=Oracle([*PROMPT, *plain[0]]))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert (outputs[-1].token_ids, outputs[-1].logprobs) == plain
    assert engine.stats().accepted_drafts > 0


def _raises(tokens: list[int], k: int) -> list[int]:
    raise ValueError("boom")


def _exits(tokens: list[int], k: int) -> list[int]:
    raise SystemExit(3)


def _hangs(tokens: list[int], k: int) -> list[int]:
    threading.Event().wait()
    return []


def _spoils(tokens: list[int], k: int) -> list[int]:
    tokens.clear()
    return [0] * k


BAD = {
    "raises": _raises,
    "exits": _exits,
    "hangs": _hangs,
    "spoils its input": _spoils,
    "out of range": lambda tokens, k: [VOCAB],
    "negative": lambda tokens, k: [-1],
    "floats": lambda tokens, k: [0.5],
    "none": lambda tokens, k: None,
    "text": lambda tokens, k: "abc",
    "endless": lambda tokens, k: iter(lambda: 3, None),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("mode", [{"certify": "startup"}, {"verify": "always"}])
def test_a_bad_drafter_hurts_nobody(name: str, mode: dict[str, Any]) -> None:
    class Bad:
        def propose(self, tokens: Sequence[int], k: int) -> Any:
            return BAD[name](list(tokens) if name != "spoils its input" else tokens, k)

    engine = make_engine(ToyModel(), small_config(**mode))
    plain, other = solo(PROMPT, PARAMS), solo(PROMPT[:5], PARAMS)
    first = engine.submit(PROMPT, PARAMS, speculate=Bad())
    second = engine.submit(PROMPT[:5], PARAMS, speculate="ngram")
    done = {}
    while engine.has_unfinished():
        done |= {o.request_id: (o.token_ids, o.logprobs) for o in engine.step() if o.finished}
    assert done == {first: plain, second: other}
    harmless = name in ("spoils its input", "endless")
    assert (engine.stats().drafter_failures == 0) == harmless
    assert engine.stats().drafter_failures <= guesses.MOST_FAILURES


def test_a_drafter_that_never_comes_back_costs_one_turn() -> None:
    """Whether it hangs when it is made or when it is asked: one thread waits, and nobody waits for it."""

    class Hangs:
        asked = 0

        def propose(self, tokens: Sequence[int], k: int) -> list[int]:
            Hangs.asked += 1
            return _hangs(list(tokens), k)

    plain = solo(PROMPT, PARAMS)
    for speculate_by in (Hangs(), lambda: _hangs([], 0)):
        before = threading.active_count()
        engine = make_engine(ToyModel(), small_config(certify="startup", speculate=speculate_by))
        for _ in range(4):
            engine.submit(PROMPT, PARAMS)
        engine.submit(PROMPT, PARAMS, speculate=None, request_id="other")
        start = time.perf_counter()
        done = [o for _ in range(200) for o in engine.step() if o.finished]
        assert time.perf_counter() - start < 10
        assert [(o.token_ids, o.logprobs) for o in done] == [plain] * 5
        assert engine.stats().drafter_failures == 1
        assert threading.active_count() == before + 1
    assert Hangs.asked == 1


def test_a_drafter_slower_than_it_is_worth_is_asked_ever_more_seldom() -> None:
    class Slow:
        asked = 0

        def propose(self, tokens: Sequence[int], k: int) -> list[int]:
            Slow.asked += 1
            time.sleep(0.002)
            return [0] * k

    speculator, tokens = Speculator(VOCAB, Stats()), list(range(5))
    for size in SIZES:
        speculator.times.took(size, 0.001)
    requests = [fake_request(Slow(), tokens) for _ in range(4)]
    for _ in range(1000):
        speculator.choose(requests, 4, SIZES[2:], 28, no_pages)
        tokens.append(1)
    assert 4 <= Slow.asked <= 4 * 8, "one question each, after pauses of 32, 64, 128 … steps"
    assert speculator._stats.drafter_failures == 0


class FakeModel:
    """A draft model that is always right and `sure` of it, at `seconds` a pass."""

    def __init__(self, right: Sequence[int], seconds: float, sure: Sequence[float]) -> None:
        self.right, self.sure, self.passes, self.asked = list(right), sure, 0, 0
        self.times = StepTimes()
        for _ in range(step_times.SAMPLES):
            self.times.took(1, seconds)

    def of(self, spec: Any) -> FakeModel:
        return self

    def chance(self, request: Any, probability: float) -> float:
        return probability

    def learn(self, request: Any, probabilities: Any, right: Any) -> None:
        assert len(right) <= len(probabilities)

    def guess(self, requests: Any, count: int, hold: Any, go_on: Any) -> list[tuple[list[int], list[float]]]:
        self.asked += 1
        (request,) = requests
        tokens: list[int] = []
        for _ in range(count):
            self.passes += 1
            tokens.append(self.right[request.num_tokens + len(tokens)])
            if not go_on(0, self.sure[len(tokens) - 1]):
                break
        return [(tokens, list(self.sure[: len(tokens)]))]


def asked_model(model: FakeModel, steps: int = 300) -> list[int]:
    speculator = Speculator(VOCAB, Stats(), models=model)  # type: ignore[arg-type]
    for size in SIZES:
        speculator.times.took(size, 1.0 + 0.05 * size)
    request, counts = fake_request("self", model.right[:5]), []
    for _ in range(steps):
        (draft,) = speculator.choose([request], 1, SIZES, 31, no_pages)
        counts.append(len(draft))
        assert draft == model.right[request.num_tokens : request.num_tokens + len(draft)]
        request.history.tokens = model.right[: request.num_tokens + len(draft) + 1]
    return counts


def test_a_model_is_asked_for_as_many_tokens_as_pay() -> None:
    right = list(np.random.default_rng(0).integers(0, VOCAB, 4000))
    cheap = asked_model(FakeModel(right, 0.1, [0.99] * 8))
    assert min(cheap[5:]) >= 6
    unsure = asked_model(FakeModel(right, 0.3, [0.99, 0.99, 0.2, *[0.99] * 5]))
    assert set(unsure[20:]) == {3} or set(unsure[20:]) == {2}, "it stops where it is not sure"
    model = FakeModel(right, 1.0, [0.99] * 8)
    costly = asked_model(model, 1000)
    assert model.asked <= 8, "once, after pauses of 32, 64, 128 … steps"
    assert model.passes <= 16
    assert sum(costly) <= 16


def test_a_drafter_that_cannot_be_made_loses_its_turn() -> None:
    class Unmade:
        def __init__(self) -> None:
            raise OSError("no weights")

        def propose(self, tokens: Sequence[int], k: int) -> list[int]:
            raise AssertionError

    engine = make_engine(config=small_config(certify="startup", speculate=Unmade))
    (output,) = engine.generate([PROMPT], PARAMS)
    assert (output.token_ids, output.logprobs) == solo(PROMPT, PARAMS)
    assert 0 < engine.stats().drafter_failures <= guesses.MOST_FAILURES


def test_what_cannot_draft_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'auto', 'ngram', .* None or a drafter"):
        small_config(speculate="fast")
    with pytest.raises(ConfigError, match="propose"):
        small_config(speculate=3)
    with pytest.raises(RequestError, match="propose"):
        make_engine().submit(PROMPT, speculate=3)  # type: ignore[arg-type]


def test_of_itself_nobody_drafts_on_several_ranks() -> None:
    limits = make_engine().limits
    for ranks, drafts in ((Ranks(0, 1), True), (Ranks(0, 2), False)):
        door = Door(limits, small_config(), None, None, ranks, None)  # type: ignore[arg-type]
        assert (door._source("auto") is not None) == drafts
        assert door._source("ngram") is not None


def test_ranks_take_the_first_one_s_drafts() -> None:
    """Step times and late drafters differ between processes, and their batches must not."""

    class Two(Ranks):
        told: list[Any] = []  # noqa: RUF012

        def share(self, value: Any) -> Any:
            if self.rank == 0:
                Two.told.append(value)
            return Two.told[-1]

    class Never:
        def propose(self, tokens: Sequence[int], k: int) -> list[int]:
            raise AssertionError("only the first rank asks")

    right = list(range(20))
    drafts = []
    for rank, drafter in ((0, Oracle(right)), (1, Never())):
        speculator = Speculator(VOCAB, Stats(), Two(rank, 2))
        speculator.times.took(1, 1.0)
        drafts.append(speculator.choose([fake_request(drafter, right[:5])], 1, [1, 2, 4, 8], 7, no_pages))
        assert speculator._stats.drafter_failures == 0
    assert drafts[0] == drafts[1]
    assert drafts[0][0] == right[5 : 5 + len(drafts[0][0])] != []
