"""`accept` against a direct statement of what it means, for every split of proposals and answers."""

from __future__ import annotations

import itertools

import pytest

from llm42c.runtime.accept import VERIFIER, accept
from llm42c.runtime.packing import Span
from llm42c.runtime.request import Request
from llm42c.runtime.sampling import Sampled, SamplingParams

PROMPT = [1, 2, 3]
EOS = 9


def make(pending: list[int], max_tokens: int = 50, deterministic: bool = True) -> Request:
    request = Request(
        *("id", 0, PROMPT, SamplingParams(max_tokens=max_tokens)),
        deterministic=deterministic,
        stream=True,
        seed=0,
        max_tokens=max_tokens,
        eos_ids=frozenset({EOS}),
        max_pages=8,
        text=None,
    )
    request.lease.num_computed = request.lease.proved = len(PROMPT) - 1
    for token in pending:
        request.propose(token)
    return request


def answer(tokens: list[int], errors: dict[int, str] | None = None) -> Sampled:
    return Sampled([0, 0, *tokens], [0.0, 0.0, *(-float(t) for t in tokens)], {}, errors or {})


@pytest.mark.parametrize(("count", "rows"), [(c, r) for c in range(4) for r in range(1, c + 2)])
def test_commits_the_agreeing_prefix_and_one_more(count: int, rows: int) -> None:
    for answers in itertools.product([4, 5], repeat=rows):
        pending = [4] * count
        request = make(pending)
        newest = len(PROMPT) - 1
        chunk = Span(request, newest, newest + rows, newest)
        verdict = accept(chunk, answer(list(answers)), 2, VERIFIER)
        agreeing = len(list(itertools.takewhile(lambda x: x[0] == x[1], zip(answers, pending, strict=False))))
        expected = list(answers[: min(rows, agreeing + 1)])
        assert request.outputs == expected
        assert request.history.logprobs == [-float(t) for t in expected]
        assert verdict.committed == len(expected) >= 1, "no progress"
        mismatch = agreeing < min(rows, count)
        assert verdict.rolled_back == mismatch
        assert verdict.dropped == (count - agreeing if mismatch else 0)
        assert request.proposal.tokens == ([] if mismatch else pending[len(expected) :])
        assert request.lease.num_computed == len(request.history.tokens) - 1
        assert request.lease.proved == request.lease.num_computed
        assert request.history.proved == request.num_outputs
        assert not request.proposal.ended
        assert not request.proposal.blocked


@pytest.mark.parametrize(("computed", "drafted"), [(c, d) for c in range(3) for d in range(1, 4)])
def test_no_draft_outlives_its_window(computed: int, drafted: int) -> None:
    count = computed + drafted
    for answers in itertools.product([4, 5], repeat=count + 1):
        request = make([4] * computed)
        assert request.extend_proposal([4] * drafted) == drafted
        newest = len(PROMPT) - 1
        verdict = accept(
            Span(request, newest, newest + count + 1, newest), answer(list(answers)), 2, VERIFIER
        )
        right = next((j for j in range(count) if answers[j] != 4), count)
        assert request.outputs == list(answers[: right + 1])
        assert verdict.drafts_accepted == max(0, right - computed)
        assert verdict.rolled_back == (right < computed), "a wrong draft is no rollback"
        assert verdict.dropped == (computed - right if right < computed else 0)
        assert (request.proposal.tokens, request.proposal.drafted) == ([], 0)
        assert request.lease.num_computed == request.lease.proved == len(request.history.tokens) - 1


def test_a_draft_is_followed_up_to_the_end_that_it_proposes() -> None:
    request = make([])
    assert request.extend_proposal([4, EOS, 5, 5]) == 1, "the model has no use for what ends the request"
    assert request.proposal.tokens == [4, EOS]
    verdict = accept(Span(request, 2, 4, 2), answer([4, EOS]), 2, VERIFIER)
    assert (request.outputs, verdict.finished, verdict.drafts_accepted) == ([4, EOS], True, 2)


def test_a_prompt_chunk_commits_nothing() -> None:
    request = make([])
    request.lease.num_computed = 0
    verdict = accept(Span(request, 0, 2, 2), answer([]), 2, VERIFIER)
    assert (verdict.committed, verdict.rolled_back) == (0, False)
    assert request.lease.num_computed == 2
    assert request.outputs == []


def test_the_end_of_the_request_ends_the_window() -> None:
    request = make([4, EOS])
    assert request.proposal.ended
    verdict = accept(Span(request, 2, 4, 2), answer([4, EOS]), 2, VERIFIER)
    assert verdict.finished
    assert not verdict.rolled_back
    assert request.outputs == [4, EOS]
    assert (request.finish_reason, request.stop_reason) == ("stop", EOS)

    early = make([4, 4, 4])
    verdict = accept(Span(early, 2, 6, 2), answer([4, EOS, 4, 4]), 2, VERIFIER)
    assert verdict.finished
    assert verdict.rolled_back
    assert early.outputs == [4, EOS]


def test_rows_beyond_max_tokens_do_not_count() -> None:
    request = make([4, 4], max_tokens=2)
    assert request.proposal.ended
    verdict = accept(Span(request, 2, 5, 2), answer([4, 4, 4]), 2, VERIFIER)
    assert request.outputs == [4, 4]
    assert request.finish_reason == "length"
    assert verdict.dropped == 0


@pytest.mark.parametrize("at", range(3))
def test_a_row_without_a_token_counts_only_if_it_is_reached(at: int) -> None:
    answers = [4, 4, 4]
    answers[at] = -1
    request = make([4, 4])
    verdict = accept(Span(request, 2, 5, 2), answer(answers), 2, VERIFIER)
    assert verdict.finished
    assert request.finish_reason == "error"
    assert request.outputs == [4] * at

    request = make([5, 5])  # the first row disagrees: later rows mean nothing
    verdict = accept(Span(request, 2, 5, 2), answer([4, -1, -1], {3: "boom"}), 2, VERIFIER)
    assert request.finish_reason is None
    assert request.outputs == [4]


def test_what_follows_unproved_ground_is_not_proved() -> None:
    request = make([4, 4])
    request.lease.proved = 1
    accept(Span(request, 2, 5, 2), answer([4, 4, 4]), 2, VERIFIER)
    assert request.outputs == [4, 4, 4]
    assert (request.lease.proved, request.history.proved) == (1, 0)


@pytest.mark.parametrize(
    ("origin", "deterministic", "proved"), [(VERIFIER, True, 1), (5, True, 0), (VERIFIER, False, 0)]
)
def test_only_the_verifier_proves_and_only_what_is_deterministic(
    origin: int, deterministic: bool, proved: int
) -> None:
    request = make([], deterministic=deterministic)
    verdict = accept(Span(request, 2, 3, 2), answer([4]), 2, origin)
    assert (verdict.committed, verdict.rolled_back, verdict.dropped) == (1, False, 0)
    assert (request.outputs, request.history.origins, request.lease.num_computed) == ([4], [origin], 3)
    assert (request.lease.proved - 2, request.history.proved) == (proved, proved)


def test_the_verifier_s_token_frees_a_request_whose_proposal_was_blocked() -> None:
    request = make([])
    request.proposal.blocked = request.proposal.drain = True
    accept(Span(request, 2, 3, 2), answer([4]), 2, VERIFIER)
    assert not request.proposal.blocked
    assert not request.proposal.drain
