"""The promise as a state machine: whatever happens around it, a deterministic request gives its solo run's
bits.

Requests of all kinds are submitted, aborted, stepped, preempted and resumed from their state in any order on
engines of all kinds.
After every step, what is committed of each deterministic request is a prefix of its solo run in a fresh
engine, tokens and log-prob bits; its canonical KV has the digest that its tokens imply; and its stream has
only grown.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy import EOS, VOCAB, Flat, NoisyModel, ToyModel, expected_digest, make_engine, small_config, solo

from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.resumption import RequestState
from llm42c.runtime.sampling import SamplingParams

PAGE, WINDOW, CHUNK = 4, 5, 12  # of `small_config`
PREFIXES = ([], [(13 * j) % VOCAB for j in range(2 * PAGE)], [(13 * j) % VOCAB for j in range(2 * CHUNK + 1)])
TAILS = sorted({1, 2, *(n + d for n in (PAGE, WINDOW, 2 * PAGE, CHUNK) for d in (-1, 0, 1)), 2 * CHUNK + 1})
AB = {0: 5.0, 1: 5.0}  # a bias that makes the text mostly "A" and "B", so that stop strings occur

PARAMS = (
    *(SamplingParams(max_tokens=n) for n in (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 2)),
    SamplingParams(max_tokens=14, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=13, temperature=0.9, seed=7),
    SamplingParams(max_tokens=13, temperature=1.5, top_k=8, top_p=0.9, seed=8),
    SamplingParams(max_tokens=13, temperature=1.2, min_p=0.1),
    SamplingParams(max_tokens=13, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.5),
    SamplingParams(max_tokens=18, temperature=1.0, logit_bias=AB, stop=("ABBA", "BBB"), seed=2),
    SamplingParams(max_tokens=18, logit_bias=AB | {7: 6.0}, min_tokens=WINDOW + 1, repetition_penalty=1.1),
    SamplingParams(max_tokens=18, logit_bias=AB, stop=("AA",), min_tokens=3, frequency_penalty=0.3),
    SamplingParams(max_tokens=18, stop_token_ids=(3, 11, 19, 27), stop=("Q",)),
)

if importlib.util.find_spec("llguidance"):
    PARAMS = (
        *PARAMS,
        SamplingParams(max_tokens=18, regex="[A-F]{2,9}(AB|CD)*G?", temperature=1.2, seed=5),
        SamplingParams(max_tokens=14, choice=("ABBA", "ABCDEFG", "ABAB"), repetition_penalty=1.2),
        SamplingParams(
            max_tokens=18, grammar='start: "A" start "B" | /[C-E]{1,3}/', min_tokens=3, stop=("EBB",)
        ),
    )

FAST = {
    "exact": lambda: ToyModel(),
    "noisy": lambda: NoisyModel(flip=0.15),
    "subtle": lambda: NoisyModel(flip=0.0),
    "small shapes noisy": lambda: NoisyModel(flip=0.1, noisy=lambda tokens, call: tokens < 4),
    "large shapes noisy": lambda: NoisyModel(flip=0.1, noisy=lambda tokens, call: tokens > 4),
    "chaos": lambda: NoisyModel(flip=0.9),
}

# What a draft may be: of the right outputs and a place in them.
ADVERSARY = {
    "silent": lambda right, at: None,
    "right": lambda right, at: right,
    "short": lambda right, at: right[:at],
    "wrong": lambda right, at: [
        *right[:at],
        *((t + 1) % VOCAB for t in right[at : at + 1]),
        *right[at + 1 :],
    ],
    "too long": lambda right, at: [*right, *range(VOCAB)],
    "stops inside": lambda right, at: [*right[:at], EOS, 3, *right[at:]],
    "stutters": lambda right, at: [*right[:at], *right[max(0, at - 1) :]],
}


class Hostile:
    """Asked again and again, it says every kind of thing."""

    def __init__(self, right: list[int], at: int) -> None:
        self.right, self.asked, self.kinds = right, at, sorted(ADVERSARY)

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        self.asked += 1
        kind = self.kinds[self.asked % len(self.kinds)]
        return (ADVERSARY[kind](self.right[len(tokens) :], self.asked % 5) or [])[:k]


seen: Counter[str] = Counter()  # over all examples, against vacuity


@functools.cache
def oracle(prompt: tuple[int, ...], params: int) -> tuple[list[int], list[float]]:
    return solo(list(prompt), PARAMS[params])


class Promise(RuleBasedStateMachine):
    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, tuple[tuple[int, ...], int, bool]] = {}
        self.streams: dict[str, tuple[list[int], list[float]]] = {}

    @initialize(
        fast=st.sampled_from(sorted(FAST)),
        verify=st.sampled_from(["auto", "auto", "always"]),
        certify=st.sampled_from(["lazy", "startup"]),
        num_pages=st.sampled_from([17, 20, 26, 64]),
        prefix_cache=st.sampled_from([True, True, False]),
        audit=st.sampled_from([0.0, 1.0, 1.0, 1.0]),
        window=st.sampled_from([1, WINDOW, WINDOW, 9]),
        verify_seqs=st.sampled_from([1, 4]),
    )
    def start(self, fast, verify, certify, num_pages, prefix_cache, audit, window, verify_seqs) -> None:  # type: ignore[no-untyped-def]
        config = small_config(
            verify=verify,
            certify=certify,
            num_pages=num_pages,
            prefix_cache=prefix_cache,
            audit_fraction=audit,
            verify_window=window,
            verify_seqs=verify_seqs,
        )
        self.engine = make_engine(FAST[fast](), config)
        self.engine._speculator.times = Flat()

    @rule(
        prefix=st.sampled_from(range(len(PREFIXES))),
        tail=st.sampled_from(TAILS),
        salt=st.integers(0, 1),
        params=st.sampled_from(range(len(PARAMS))),
        deterministic=st.sampled_from([True, True, True, False]),
        stream=st.booleans(),
        adversary=st.sampled_from(sorted(ADVERSARY)),
        at=st.integers(0, 20),
        drafter=st.sampled_from([None, "ngram", "hostile", "self", "auto:self", "model:toy"]),
    )
    def submit(
        self, prefix, tail, salt, params, deterministic, stream, adversary="silent", at=0, drafter=None
    ) -> None:  # type: ignore[no-untyped-def]
        prompt = (*PREFIXES[prefix], *((5 * salt + 3 * j + tail) % VOCAB for j in range(tail)))
        chosen = PARAMS[params]
        if not deterministic and chosen.seed is None:
            chosen = dataclasses.replace(chosen, seed=params)  # so that examples can be replayed
        draft = ADVERSARY[adversary](oracle(prompt, params)[0], at) if deterministic else None
        if drafter == "hostile":
            drafter = Hostile([*prompt, *oracle(prompt, params)[0]] if deterministic else [], at)
        request_id = self.engine.submit(
            list(prompt), chosen, deterministic=deterministic, stream=stream, draft=draft, speculate=drafter
        )
        self.live[request_id] = (prompt, params, deterministic)
        self.streams[request_id] = ([], [])

    @rule(count=st.integers(1, 9))
    def step(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                self.take(output)
            self.check_requests()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        assert self.engine.abort(request_id)
        del self.live[request_id]
        seen["aborts"] += 1

    @precondition(lambda self: self.engine._scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        scheduler = self.engine._scheduler
        request = data.draw(st.sampled_from(range(len(scheduler.running))))
        seen["forced preemptions"] += 1
        seen["pending lost"] += scheduler.preempt(scheduler.running[request])

    @precondition(lambda self: any(d for _, _, d in self.live.values()))
    @rule(data=st.data(), stream=st.booleans())
    def move(self, data: st.DataObject, stream: bool) -> None:
        """A request goes on from its state, as it would in another engine."""
        there = sorted(i for i, (_, _, deterministic) in self.live.items() if deterministic)
        request_id = data.draw(st.sampled_from(there))
        state = RequestState.from_json(self.engine.export(request_id).to_json())
        self.engine.abort(request_id)
        del self.streams[request_id]
        moved = self.engine.resume(state, stream=stream)
        self.live[moved] = self.live.pop(request_id)
        self.streams[moved] = (list(state.tokens), list(state.logprobs))
        seen["moved in the middle"] += bool(state.tokens)

    def take(self, output: RequestOutput) -> None:
        prompt, params, deterministic = self.live[output.request_id]
        tokens, logprobs = self.streams[output.request_id]
        tokens += output.new_token_ids
        logprobs += output.new_logprobs
        if deterministic:
            expected = oracle(prompt, params)
            assert tokens == expected[0][: len(tokens)]
            assert logprobs == expected[1][: len(tokens)]
        if output.finished:
            assert output.error is None
            assert (output.token_ids, output.logprobs) == (tokens, logprobs)
            if deterministic:
                assert len(tokens) == len(expected[0])
            del self.live[output.request_id]
            seen["finished"] += deterministic

    def check_requests(self) -> None:
        for request_id, (prompt, params, deterministic) in self.live.items():
            request = self.engine._requests[request_id]
            if deterministic:
                expected = oracle(prompt, params)
                count = request.num_outputs
                assert request.outputs == expected[0][:count]
                assert request.history.logprobs == expected[1][:count]
                if request.lease.pages:
                    digest = self.engine.kv_digest(request_id)
                    assert digest == expected_digest(request.history.tokens, request.lease.num_computed)
            else:
                assert not request.proposal.tokens
                assert not request.history.page_keys or self.engine.config.prefix_cache

    @invariant()
    def pages_are_accounted_for(self) -> None:
        if not hasattr(self, "engine"):
            return
        pool = self.engine._pool
        held = Counter(p for r in self.engine._scheduler.running for p in r.lease.pages)
        assert all(pool.refs[p] == held[p] for p in range(pool.num_pages))
        assert pool.num_free == pool.num_pages - len(held)
        assert all(not r.lease.pages for r in self.engine._scheduler.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(2000):
            if not self.engine.has_unfinished():
                break
            for output in self.engine.step():
                self.take(output)
        assert not self.engine.has_unfinished(), "the engine stands still"
        assert not self.live
        stats = self.engine.stats()
        assert stats.revocations == 0
        for name in (
            "rollbacks",
            "preemptions",
            "prefix_hits",
            "certified_tokens",
            "verified_tokens",
            "audits",
            "drafted_tokens",
            "accepted_drafts",
        ):
            seen[name] += getattr(stats, name)
        seen["passes of draft models"] += stats.seconds_draft > 0


@pytest.mark.slow
def test_the_promise() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    seen.clear()
    run_state_machine_as_test(
        Promise,
        settings=settings(
            max_examples=200,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,  # so that what is asserted below about the examples holds on every run
            suppress_health_check=list(HealthCheck),
        ),
    )
    for name in (
        *("rollbacks", "preemptions", "prefix_hits", "certified_tokens", "verified_tokens", "audits"),
        "moved in the middle",
        "passes of draft models",
        *("aborts", "forced preemptions", "pending lost", "finished", "drafted_tokens", "accepted_drafts"),
    ):
        assert seen[name] > 0, f"vacuous: no {name}"


def test_the_state_machine_notices_a_broken_promise() -> None:
    """Negative control: the same machine on engines that trust every bucket."""

    class Trusting(Promise):
        def start(self, **kwargs) -> None:  # type: ignore[no-untyped-def]
            self.engine = make_engine(NoisyModel(flip=0.1), small_config(audit_fraction=0.0))
            self.engine.certificates.commits = lambda shape: True  # type: ignore[method-assign]

    machine = Trusting()
    machine.start()
    machine.submit(prefix=1, tail=5, salt=0, params=4, deterministic=True, stream=True)
    with pytest.raises(AssertionError):
        machine.step(count=20)
